"""One step of the optimizer.

`branch_update` uses the gradient of one branch; compiled for each branch, it is `recovery_update` and `review_update`.
`mixed_update`, for comparison, uses the gradients of all branches.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from camopd_jax.config.schema import SftConfig, TrainConfig
from camopd_jax.method import optimizer, schedule
from camopd_jax.method.gradient import Gradient
from camopd_jax.method.objectives import Objective
from camopd_jax.method.optimizer import LAST_GRADIENT
from camopd_jax.method.statistics import answer_table, step_statistics
from camopd_jax.method.weights import selected_tokens
from camopd_jax.types import Batch, Params, Record, Sequences, TrainState

Metrics = dict[str, Any]  # scalars by name, and the table of answers; for a mixed step also each branch's


def branch_update(
    state: TrainState,
    gradient: Gradient,
    batch: Batch,
    *,
    branch: str,
    config: TrainConfig,
    objective: Objective | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of a branch toward its teacher (Eq 9).

    Args:
      objective: of the branch; needed only if it has a state.
    """
    own, moments = config.branches[branch], "shared" if config.method.moments == "shared" else branch
    if own.clip_norm is not None:
        config = replace(config, optimizer=replace(config.optimizer, clip_norm=own.clip_norm))
    against = state.moments[LAST_GRADIENT + own.project_against] if own.project_against else None
    state, stats = _take_step(state, gradient, _finite_gap_mass(batch), moments, config, against)
    if (name := LAST_GRADIENT + branch) in state.moments:
        skipped = stats["skipped"] > 0
        last = jax.tree.map(lambda old, new: jnp.where(skipped, old, new), state.moments[name], gradient.of)
        state = state.replace(moments=state.moments | {name: last})
    objectives = {} if objective is None else {branch: objective}
    state, adapted = _adapt(state, objectives, {branch: gradient}, stats["skipped"])
    return state, _branch_metrics(gradient, batch) | stats | adapted.get(branch, {})


def mixed_update(
    state: TrainState,
    gradients: dict[str, Gradient],
    batches: dict[str, Batch],
    *,
    config: TrainConfig,
    objectives: Mapping[str, Objective] = MappingProxyType({}),
) -> tuple[TrainState, Metrics]:
    """One step along the sum of all branches' gradients (Eq 3), each weighted by its share of the step's prompts.

    Alternating branches are compared with this. The metrics of each branch are under its name.

    Args:
      objectives: of the branches; needed only for those with a state.
    """
    rows = schedule.trained_rows(config, {name: len(batch.index) for name, batch in batches.items()}, state.step)
    share: dict[str, Any] = {name: n / sum(rows.values()) for name, n in rows.items()}
    balance = gap_spread(batches) if config.method.balance == "gap_spread" else {}
    share |= {name: share[name] * factor for name, factor in balance.items()}
    loss = sum((share[name] * gradient.loss for name, gradient in gradients.items()), start=jnp.float32(0))
    weighted = [jax.tree.map(lambda g, s=share[name]: s * g, gradient.of) for name, gradient in gradients.items()]
    if config.method.conflict == "pcgrad":
        weighted = pcgrad(weighted)
    total = Gradient(loss, jax.tree.map(lambda first, *rest: sum(rest, start=first), *weighted))
    finite = jnp.all(jnp.stack([_finite_gap_mass(batch) for batch in batches.values()]))
    state, stats = _take_step(state, total, finite, "shared", config)
    state, adapted = _adapt(state, objectives, gradients, stats["skipped"])
    of_branches: dict[str, Metrics] = {
        name: _branch_metrics(gradients[name], batch) | adapted.get(name, {}) for name, batch in batches.items()
    }
    for name, factor in balance.items():
        of_branches[name]["balance"] = factor
    tokens = {
        name: sum(metrics[name] for metrics in of_branches.values()) for name in ("prompt_tokens", "response_tokens")
    }
    return state, {"loss": loss} | tokens | stats | of_branches


def _adapt(
    state: TrainState, objectives: Mapping[str, Objective], gradients: dict[str, Gradient], skipped: jax.Array
) -> tuple[TrainState, dict[str, Record]]:
    """The state with the new numbers of objectives that have a state, unless the step was skipped; and these numbers,
    by branch.
    """
    adapted = {}
    for name in objectives.keys() & state.objectives.keys():
        old = state.objectives[name]
        new = objectives[name].next_state(old, gradients[name].loss)
        if new is not old:  # or its part of the run, the warm-up, has another objective
            adapted[name] = {key: jnp.where(skipped > 0, old[key], new[key]) for key in old}
    return state.replace(objectives=state.objectives | adapted), adapted


def gap_spread(batches: dict[str, Batch]) -> dict[str, jax.Array]:
    """The factor of each branch in DN-MOPD: `clip(sigma_all / sigma_branch, 1/4, 4)`.

    sigma is the standard deviation of the gaps of the tokens that are trained, those of the selected answers.
    """
    gaps = {name: batch.log_probs.gap.reshape(-1) for name, batch in batches.items()}
    masks = {name: selected_tokens(batch).reshape(-1) for name, batch in batches.items()}
    of_all = _deviation(jnp.concatenate(list(gaps.values())), jnp.concatenate(list(masks.values())))
    factors = {name: of_all / jnp.maximum(_deviation(gaps[name], masks[name]), 1e-30) for name in batches}
    return {name: jnp.where(of_all > 0, jnp.clip(factor, 0.25, 4.0), 1.0) for name, factor in factors.items()}


def _deviation(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The standard deviation of the masked values, float32[]."""
    count = jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(jnp.where(mask, values, 0)) / count
    return jnp.sqrt(jnp.sum(jnp.where(mask, jnp.square(values - mean), 0)) / count)


def pcgrad(gradients: list[Params]) -> list[Params]:
    """Removes from each gradient the components that oppose the others (arXiv 2001.06782, Algorithm 1, fixed order).

    If `g . d < 0` for another gradient d before its own projection: `g <- g - (g . d / |d|^2) d`.
    """
    projected = list(gradients)
    for i, j in itertools.permutations(range(len(gradients)), 2):
        other = gradients[j]
        dot = jnp.minimum(optax.tree.vdot(projected[i], other), 0)
        factor = dot / jnp.maximum(optax.tree.vdot(other, other), 1e-30)
        projected[i] = jax.tree.map(lambda g, d, factor=factor: g - factor * d, projected[i], other)
    return projected


def sft_update(
    state: TrainState, gradient: Gradient, batch: Sequences, *, config: SftConfig
) -> tuple[TrainState, Metrics]:
    """One step of supervised fine-tuning."""
    state, stats = _take_step(state, gradient, jnp.bool_(True), "shared", config)
    counts = {"prompt_tokens": jnp.sum(batch.prompts.lengths), "response_tokens": jnp.sum(batch.lengths)}
    return state, {"loss": gradient.loss} | counts | stats


def _branch_metrics(gradient: Gradient, batch: Batch) -> Metrics:
    """The metrics of a branch's batch. Monitors are means over the tokens that are trained."""
    trained = jnp.maximum(jnp.sum(batch.selection.weights * batch.rollout.lengths), 1)
    monitors = {name: total / trained for name, total in gradient.monitors.items()}
    return {"loss": gradient.loss, "answers": answer_table(batch)} | step_statistics(batch) | monitors


def _finite_gap_mass(batch: Batch) -> jax.Array:
    """Whether every gap mass is finite; if one is not, the selection is not valid."""
    return jnp.all(jnp.isfinite(batch.selection.mass))


def _take_step(
    state: TrainState,
    gradient: Gradient,
    finite: jax.Array,
    moments: str,
    config: TrainConfig | SftConfig,
    against: Params | None = None,
) -> tuple[TrainState, Metrics]:
    """One AdamW step if loss and gradient are finite; else the step is skipped and counted."""
    first = schedule.first_step(config)
    rate = optimizer.learning_rate(config.optimizer, config.steps - first, state.step - first)
    finite &= jnp.isfinite(gradient.loss)
    params, adam, stats = optimizer.apply(
        state.params, state.moments[moments], gradient.of, rate, config.optimizer, finite, against
    )
    finite = stats.pop("finite")
    average, decay = state.average, config.optimizer.average
    if decay is not None:
        average = optimizer.averaged(average, params, decay, state.step + 1, finite)
    moved = {"params": params, "moments": state.moments | {moments: adam}, "average": average}
    state = state.replace(step=state.step + 1, **moved)
    return state, stats | {"skipped": 1 - finite.astype(jnp.int32)}
