"""Scores models on the benchmarks of a config: any Hugging Face folder, hub name, or run."""

import re
from dataclasses import dataclass
from pathlib import Path

from absl import flags
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from camopd_jax.runs import export
from camopd_jax.evals import runner
from camopd_jax.inference import loading
from camopd_jax.runtime import cli
from camopd_jax.config.schema import SftConfig, TrainConfig
from camopd_jax.inference.loading import Loaded
from camopd_jax.errors import UserError
from camopd_jax.evals.results import Result
from camopd_jax.runtime.jsonl import read_rows
from camopd_jax.runtime.metrics import Display, MetricsWriter
from camopd_jax.runtime.distributed import is_primary, broadcast
from camopd_jax.runtime.mesh import check_rows, make_mesh

Config = TrainConfig | SftConfig


def evaluate(config: Config, checkpoints: list[str], workdir: str) -> dict[str, list[Result]]:
    """The results of each model on each benchmark, by the model's name."""
    settings, folder = config.evaluation, epath.Path(workdir)
    if not settings.benchmarks:
        raise UserError("config.evaluation.benchmarks: there is none; name at least one")
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_rows(mesh, "config.evaluation.batch_size", settings.batch_size)
    runner.check(settings)
    folder.mkdir(parents=True, exist_ok=True)
    evaluator = runner.Evaluator(settings, folder, MetricsWriter(folder, tensorboard=False), Display(0, 0))
    models: dict[str, list[Result]] = {}
    for name, source in ((s, s) for s in checkpoints) if checkpoints else own_models(config).items():
        found = load(config, source, mesh)
        models[name] = evaluator.run(name, found.loaded, key=found.key)
    return known_baselines(folder, models) | models


def own_models(config: Config) -> dict[str, str]:
    if isinstance(config, SftConfig):
        return {"start": config.model}
    return {"general": config.general_model, "specialised": config.specialised_model}


@dataclass(frozen=True)
class Checkpoint:
    """A model in memory, and where it comes from."""

    loaded: Loaded
    key: str  # of its answers
    run: epath.Path | None  # the work directory, where it is a run's
    step: int  # of the run; else 0


def load(config: Config, source: str, mesh: Mesh) -> Checkpoint:
    """What --checkpoint names: a Hugging Face folder, a work directory (its last checkpoint) or one step of it."""
    step = re.fullmatch(r"(.+)/checkpoints/(\d+)/?", source)
    run = step[1] if step else source
    if (epath.Path(run) / "checkpoints").exists():
        loaded, provenance = export.restored(run, int(step[2]) if step else None)
        done = int(provenance["steps"])
        return Checkpoint(loaded, runner.run_key(provenance["config_fingerprint"], done), epath.Path(run), done)
    folder: Path = loading.find(source, "--checkpoint")
    dtype = loading.teacher_dtype(config.compute)
    context = max((b.max_response_tokens for b in config.evaluation.benchmarks), default=0)
    loaded = loading.load(folder, mesh, config.compute, dtype=dtype, context=context)
    return Checkpoint(loaded, runner.model_key(loaded), None, 0)


def known_baselines(folder: epath.Path, models: dict[str, list[Result]]) -> dict[str, list[Result]]:
    """The general and the specialised model's results on the very same questions, where eval.jsonl has them all."""
    asked = [row["asked"] for row in next(iter(models.values()))]
    rows = {(row["model"], row.get("asked")): row for row in broadcast(lambda: read_rows(folder / "eval.jsonl"))}
    names = ("general", "specialised")
    if not all((name, questions) in rows for name in names for questions in asked):
        return {}
    return {name: [rows[name, questions] for questions in asked] for name in names}
