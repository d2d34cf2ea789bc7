"""The model card of an exported folder: metadata for the hub, results, sources, and how to load the model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from etils import epath

from camopd_jax import __version__
from camopd_jax.config.schema import Config, TrainConfig
from camopd_jax.data import sources
from camopd_jax.data.pipeline import SELF
from camopd_jax.evals.results import Result, on_questions
from camopd_jax.evals.tables import TEACHERS, TITLES, accuracy_rows
from camopd_jax.inference.loading import Loaded
from camopd_jax.models import hf
from camopd_jax.models.disk import hub_revision
from camopd_jax.models.peft_settings import base_folder
from camopd_jax.runtime.jsonl import read_rows

LICENCE = "The base model's licence applies."


@dataclass(frozen=True)
class RunRecord:
    """What a model card says about a run, besides its provenance."""

    results: Mapping[str, list[Result]] = field(default_factory=dict)  # of each model on the same questions; {}: none
    datasets: tuple[str, ...] = ()  # names of hub datasets that the run read its prompts from


def read_record(workdir: epath.Path, config: Config, step: int) -> RunRecord:
    """The record of a run's model after `step` steps; without results unless all models have them."""
    streams = [branch.prompts for branch in config.branches.values()] if isinstance(config, TrainConfig) else []
    read = [stream.source for stream in streams] if isinstance(config, TrainConfig) else [config.data.source]
    names = [name for source in read for name in sources.names(source) if not _is_local(name)]
    datasets = tuple(dict.fromkeys(name.partition("@")[0].partition(":")[0] for name in names))
    return RunRecord(_results(read_rows(workdir / "eval.jsonl"), config, step), datasets)


def _is_local(name: str) -> bool:
    """Whether prompts come from no dataset of the hub."""
    return name in ("", SELF) or sources.is_file(name)


def _results(rows: list[Result], config: Config, step: int) -> dict[str, list[Result]]:
    benchmarks = [benchmark.name for benchmark in config.evaluation.benchmarks]
    models = (*TEACHERS, "student") if isinstance(config, TrainConfig) else ("start", "student")
    last = {(row["model"], row["benchmark"], row["step"]): row for row in rows}
    wanted = {model: [(model, name, step if model == "student" else 0) for name in benchmarks] for model in models}
    if not benchmarks or any(key not in last for keys in wanted.values() for key in keys):
        return {}
    counts = [last[key]["n"] for key in wanted["student"]]
    return {
        model: [on_questions(last[key], range(min(n, last[key]["n"]))) for key, n in zip(keys, counts, strict=True)]
        for model, keys in wanted.items()
    }


def model_card(name: str, provenance: dict[str, str], loaded: Loaded, record: RunRecord) -> str:
    """README.md of an exported folder."""
    made_from = base = provenance.get("specialised_model", provenance.get("model"))
    library = "transformers"
    if loaded.adapter is not None:
        base, library, folder = loaded.adapter.base_name, "peft", base_folder(loaded.folder)
        provenance = provenance | {"base_model": base, "base_fingerprint": hf.fingerprint(folder)}
        if revision := hub_revision(folder):
            provenance["base_revision"] = revision
    facts = "\n".join(f"| {name.replace('_', ' ')} | `{value}` |" for name, value in provenance.items())
    front = [f"library_name: {library}", "pipeline_tag: text-generation", f"base_model: {json.dumps(base)}"]
    front += [f"license: {licence}"] if (licence := _licence(base_folder(loaded.folder))) else []
    front += [f"datasets: {json.dumps(record.datasets)}"] if record.datasets else []
    front += ['tags: ["camopd", "on-policy-distillation"]'] if provenance["method"].startswith("CaMOPD") else []
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {name}",
        f"Made from `{made_from}` by {provenance['method']} with camopd_jax {__version__}.",
        _results_table(record.results),
        _how_to_load(library),
        f"| | |\n|---|---|\n{facts}",
        LICENCE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _licence(folder: Path) -> str | None:
    """The licence that the card of a local folder names; None without one."""
    from huggingface_hub import ModelCard  # slow to import, and only needed here

    try:
        return ModelCard.load(folder / "README.md").data.license if (folder / "README.md").exists() else None
    except (ValueError, OSError):  # a card with damaged metadata
        return None


def _results_table(models: Mapping[str, list[Result]]) -> str:
    """The accuracy of each model as a Markdown table; "" without results."""
    if not models:
        return ""
    rows = accuracy_rows(models)
    titles = [TITLES.get(name, name) for name in models]
    titles += ["back or kept"] if len(rows[0][1]) > len(titles) else []
    lines = [["benchmark", *titles], ["---"] + ["--:"] * len(titles), *([name, *cells] for name, cells in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"## Results\n\nAccuracy in %, ± one standard error over questions.\n\n{table}"


def _how_to_load(library: str) -> str:
    name, imports = "AutoModelForCausalLM", "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if library == "peft":
        name = "AutoPeftModelForCausalLM"
        imports = f"from peft import {name}\nfrom transformers import AutoTokenizer"
    code = (
        f"{imports}\n\n"
        f'folder = "."  # this folder, or its name on the hub\n'
        f"model = {name}.from_pretrained(folder)\ntokenizer = AutoTokenizer.from_pretrained(folder)"
    )
    return f"## How to load\n\n```python\n{code}\n```"
