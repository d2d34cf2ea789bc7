"""Evaluates models on the benchmarks of a config: a Hugging Face folder, a hub name, or a run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from etils import epath
from jax.sharding import Mesh

from camopd_jax.config.schema import Config, SftConfig
from camopd_jax.errors import UserError
from camopd_jax.evals import runner
from camopd_jax.evals.results import Result
from camopd_jax.inference import loading
from camopd_jax.inference.loading import Loaded
from camopd_jax.runs import export
from camopd_jax.runtime.display import Display
from camopd_jax.runtime.distributed import broadcast
from camopd_jax.runtime.jsonl import read_rows
from camopd_jax.runtime.mesh import check_rows, mesh_of
from camopd_jax.runtime.metrics import MetricsWriter


def evaluate(config: Config, checkpoints: Sequence[str], workdir: str) -> dict[str, list[Result]]:
    """The results of each model on each benchmark, by the model's name.

    Args:
      checkpoints: values of --checkpoint; if empty, the config's models are evaluated.
      workdir: folder for eval.jsonl and the answers.

    Raises:
      UserError: for a config without benchmarks, and models or questions that cannot be read.
    """
    settings, folder = config.evaluation, epath.Path(workdir)
    if not settings.benchmarks:
        raise UserError("config.evaluation.benchmarks is empty; give at least one")
    mesh = mesh_of(config.mesh)
    check_rows(mesh, "config.evaluation.batch_size", settings.batch_size)
    runner.check(settings)
    folder.mkdir(parents=True, exist_ok=True)
    display = Display(0, 0)
    for line in runner.notices(settings):
        display.print(line)
    evaluator = runner.Evaluator(settings, folder, MetricsWriter(folder), display)
    names = {name: name for name in checkpoints} or own_models(config)
    results: dict[str, list[Result]] = {}
    for name, location in names.items():
        model = load_model(config, location, mesh)
        results[name] = evaluator.run(name, model.loaded, key=model.key)
    return known_baselines(folder, results) | results


def own_models(config: Config) -> dict[str, str]:
    """The models of a config, by their names in tables."""
    if isinstance(config, SftConfig):
        return {"start": config.model}
    return {"general": config.general_model, "specialised": config.specialised_model}


@dataclass(frozen=True)
class EvaluatedModel:
    """A loaded model that --checkpoint names."""

    loaded: Loaded
    key: str  # of its answers
    run: epath.Path | None  # the work directory, if it is a run's checkpoint
    step: int  # of the checkpoint; 0 if it is not a run's


def load_model(config: Config, location: str, mesh: Mesh) -> EvaluatedModel:
    """Loads a Hugging Face folder, a work directory (its last checkpoint) or one checkpoint of it."""
    checkpoint = re.fullmatch(r"(.+)/checkpoints/(\d+)/?", location)
    run = checkpoint[1] if checkpoint else location
    if (epath.Path(run) / "checkpoints").exists():
        loaded, provenance, _ = export.restore_model(run, int(checkpoint[2]) if checkpoint else None)
        step = int(provenance["steps"])
        return EvaluatedModel(loaded, runner.run_key(provenance["config_fingerprint"], step), epath.Path(run), step)
    loaded = loading.load(
        loading.find(location, "--checkpoint"),
        mesh,
        config.compute,
        dtype=loading.teacher_dtype(config.compute),
        context=max((benchmark.max_response_tokens for benchmark in config.evaluation.benchmarks), default=0),
    )
    return EvaluatedModel(loaded, runner.model_key(loaded), None, 0)


def known_baselines(folder: epath.Path, results: dict[str, list[Result]]) -> dict[str, list[Result]]:
    """The results of the general and the specialised model on exactly the same questions, if eval.jsonl has them."""
    keys = [row["asked"] for row in next(iter(results.values()))]
    rows = {(row["model"], row.get("asked")): row for row in broadcast(lambda: read_rows(folder / "eval.jsonl"))}
    names = ("general", "specialised")
    if not all((name, key) in rows for name in names for key in keys):
        return {}
    return {name: [rows[name, key] for key in keys] for name in names}
