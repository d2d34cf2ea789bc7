"""Values for the fields that are "auto": chosen for a device's memory, by the plan's arithmetic, before anything runs.

On a CPU: remat `rollout` where the run can use it, else `block`, and at most `CPU_ROWS` rows a device. Elsewhere: of
`dots` and `block` in every possible micro-batch, the choice with the least time of a gradient (`relative_seconds`) of
those whose memory, as `costs.memory_estimate` counts it, is at most `MARGIN` of the device's. If none is, the one that
needs the least. The choice depends on nothing but config, models, devices and their memory.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

from etils import epath

from camopd_jax.config.identity import read_stored
from camopd_jax.config.schema import AUTO, TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.method.setup import Setup, resolve
from camopd_jax.planning.arrays import ModelShapes
from camopd_jax.planning.costs import kept_rows, memory_estimate
from camopd_jax.planning.search import changed
from camopd_jax.runtime.mesh import batch_shards, mesh_of, platform

GIB = 2**30
REMAT, MICRO_BATCH = "compute.remat", "optimizer.micro_batch"  # the fields that may be "auto"
# Of the device's memory, what a choice may need by the estimate. Peaks of gradients were 0.6 to 1.1 times the estimate
# (compilers for CPU and TPU, an H200); code, evaluations and what an allocator cannot use come to that
MARGIN = 0.8
CPU_ROWS = 8  # more are slower there (docs/performance_record.md)
# A gradient's seconds relative to `dots`, and the tokens of a micro-batch whose time equals the time that each
# micro-batch takes in addition: fitted to four measured gradients of Qwen3-1.7B's shape on an H200. `none` was slower
SLOWER = {"dots": 1.0, "block": 1.13}
OVERHEAD_TOKENS = 1000
WASTED = 3 / 16  # of a micro-batch: rows without an answer in the last ones, in the mean over the number selected

Values = dict[str, Any]  # of fields, by name


@dataclass(frozen=True)
class Choice:
    """A config with values in place of "auto"."""

    config: TrainConfig
    values: Values  # those chosen; {}: none was "auto"
    needs: float  # bytes on one device, by the estimate
    limit: float  # bytes of one device

    def __str__(self) -> str:
        remat, rows = self.config.compute.remat, self.config.optimizer.micro_batch
        over = "" if self.needs <= self.limit else ", which is too much by the plan"
        return f"remat {remat}, micro-batch {rows}: {_gib(self.needs)} of {_gib(self.limit)} GiB by the plan{over}"


def choose(
    config: TrainConfig, models: ModelShapes, devices: Any, limit: float, before: Values | None = None
) -> Choice:
    """Values for the fields that are "auto".

    Args:
      devices: to run on; None: all of JAX. limit: bytes of one of them.
      before: values of an earlier start of the run, which are kept where they fit these devices.

    Raises:
      UserError: as `resolve`.
    """
    fields = _automatic(config)
    setup = resolve(possible(config, devices), devices)
    options = [replace(setup, config=changed(setup.config, values)) for values in _options(setup, fields)]
    memory = [max(memory_estimate(one, models).values()) for one in options]
    fitting = [i for i, needs in enumerate(memory) if needs <= MARGIN * limit]
    kept = [i for i in fitting if before and all(_get(options[i].config, field) == before[field] for field in fields)]
    best = next(iter(kept or fitting), None)
    if best is None:
        best = min(range(len(options)), key=memory.__getitem__)
    chosen = options[best].config
    return Choice(chosen, {field: _get(chosen, field) for field in fields}, memory[best], limit)


def possible(config: TrainConfig, devices: Any) -> TrainConfig:
    """The config with values in place of "auto" with which it can be set up on devices, whatever their memory."""
    always = {REMAT: "block", MICRO_BATCH: batch_shards(mesh_of(config.mesh, devices))}
    return cast(TrainConfig, changed(config, {field: always[field] for field in _automatic(config)}))


def _automatic(config: TrainConfig) -> list[str]:
    return [field for field in (REMAT, MICRO_BATCH) if _get(config, field) == AUTO]


def _options(setup: Setup, fields: list[str]) -> list[Values]:
    """All possible values of the fields that are "auto", the quickest first."""
    config, shards, cpu = setup.config, batch_shards(setup.mesh), platform(setup.mesh) == "cpu"
    remats: list[str] = [config.compute.remat]
    rows = [setup.micro_batch]
    if REMAT in fields:
        by_rollout = cpu and setup.trusts_sampler and not config.rollout.concurrency
        remats = (["rollout"] * by_rollout + ["block"]) if cpu else list(SLOWER)
    if MICRO_BATCH in fields:
        answers = config.rollout.batch_size * config.rollout.answers_per_prompt
        most = CPU_ROWS * shards if cpu else answers
        rows = [n for n in range(most, 0, -1) if answers % n == 0 and n % shards == 0] or rows
    values = [{REMAT: remat, MICRO_BATCH: n} for remat in remats for n in rows]
    return values if cpu else sorted(values, key=lambda one: relative_seconds(setup, one[REMAT], one[MICRO_BATCH]))


def relative_seconds(setup: Setup, remat: str, rows: int) -> float:
    """Of a gradient, in units without meaning: only the order counts."""
    config = setup.config
    kept = max(kept_rows(setup, branch) for branch in config.branches)
    wasted = WASTED * rows / kept if kept < max(setup.rows.values()) else 0.0
    tokens = rows / batch_shards(setup.mesh) * setup.context
    return SLOWER.get(remat, 1.0) * (1 + OVERHEAD_TOKENS / tokens) * (1 + wasted)


def stored_values(workdir: str | None) -> Values:
    """The values of both fields in a work directory; {}: it has no run. Whose run it is, is checked later."""
    file = epath.Path(workdir or "") / "config.json"
    if not workdir or not file.exists():
        return {}
    try:
        _, values = read_stored(file)
        return {field: _get(values, field) for field in (REMAT, MICRO_BATCH)}
    except (UserError, KeyError, TypeError):
        return {}


def _get(config: Any, field: str) -> Any:
    """A field of a config, or of its JSON values."""
    for name in field.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


def _gib(n: float) -> str:
    return f"{n / GIB:.3g}"
