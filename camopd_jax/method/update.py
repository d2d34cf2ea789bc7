"""The two updates of CaMOPD, their mixture and supervised fine-tuning: one weighted log-likelihood.

A gradient is summed over the selected answers a few at a time (`add_gradient`), each branch's alone; then
`recovery_update` or `review_update`, compiled apart, takes one step along it.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from camopd_jax.config.schema import SftConfig, TrainConfig
from camopd_jax.method import optimizer
from camopd_jax.method.statistics import answer_table, step_statistics
from camopd_jax.method.token_weights import token_weights
from camopd_jax.rollout.masks import length_mask
from camopd_jax.rollout.score import score
from camopd_jax.runtime.mesh import take_rows
from camopd_jax.types import LanguageModel, Params, Prompts, Residuals, Scored, SftBatch, TrainState

Metrics = dict[str, jax.Array]


@struct.dataclass
class Gradient:
    """A loss summed over answers, and its gradient."""

    loss: jax.Array  # float32[]
    of: Params  # float32, like the parameters


def no_gradient(params: Params) -> Gradient:
    return Gradient(jnp.float32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))


def add_gradient(
    model: LanguageModel,
    params: Params,
    so_far: Gradient,
    prompts: Prompts,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    weights_BT: jax.Array,
    residuals: Residuals,
    rows_KM: jax.Array,
    count: jax.Array,
    *,
    slots: int,
    answer_slots: int,
    chunk: int,
) -> Gradient:
    """`so_far` and, of the rows of the first `count` micro-batches, `-sum weight log pi` and its gradient.

    The weights already hold every normalisation over the whole batch: how it is cut into micro-batches,
    or spread over devices, changes nothing.

    Args:
      weights_BT: constants, float32 (`branch_weights`, `sft_weights`).
      residuals: of the batch's tokens under `params`, as a rollout kept them; (): there is a forward pass.
      rows_KM: of the batch, M at a time; one beyond the last stands for nobody. Of K = 1 all are taken.
      slots, answer_slots: that hold these rows' longest prompt and answer together, and longest answer.
      chunk: tokens whose logits may exist at one time.
    """
    arrays = (prompts, tokens_BT[:, :answer_slots], lengths_B, weights_BT[:, :answer_slots], residuals)
    others = {name: p for name, p in params.items() if name != "layers"}

    def loss(others: Params, layers: Params, rows_M: jax.Array) -> jax.Array:
        some, tokens_MT, lengths_M, weights_MT, stream = take_rows(arrays, rows_M, model.mesh)
        weights_MT = jnp.where((rows_M < len(lengths_B))[:, None], weights_MT, 0)
        log_probs_MT = score(
            model, params | others, some, tokens_MT, lengths_M, chunk, slots=slots, so_far=layers, residuals=stream
        )
        return -jnp.sum(weights_MT * log_probs_MT)

    def add(k: jax.Array | int, so_far: Gradient) -> Gradient:
        value, (grads, layers) = jax.value_and_grad(loss, argnums=(0, 1))(others, so_far.of["layers"], rows_KM[k])
        total = {
            name: jax.tree.map(lambda a, g: a + g.astype(jnp.float32), so_far.of[name], grads[name]) for name in grads
        }
        return Gradient(so_far.loss + value, total | {"layers": layers})

    return add(0, so_far) if len(rows_KM) == 1 else jax.lax.fori_loop(0, count, add, so_far)


def branch_weights(branch: str, scored: Scored, *, config: TrainConfig) -> jax.Array:
    """Eq 9 of a branch's selected answers: `losses.token_weights` with the branch's own scale."""
    phase = getattr(config.method, branch)
    return token_weights(scored.scores, scored.rollout, scored.selection, config.method, phase)


def sft_weights(lengths_B: jax.Array, slots: int) -> jax.Array:
    """Cross-entropy, mean over the batch's answer tokens."""
    return length_mask(lengths_B, slots) / jnp.sum(lengths_B).astype(jnp.float32)


def recovery_update(
    state: TrainState, gradient: Gradient, general: Scored, *, config: TrainConfig
) -> tuple[TrainState, Metrics]:
    """One step toward the original model on general prompts (Eq 9 with r_g)."""
    return _branch_update("recovery", state, gradient, general, config)


def review_update(
    state: TrainState, gradient: Gradient, domain: Scored, *, config: TrainConfig
) -> tuple[TrainState, Metrics]:
    """One step toward the specialised model on domain prompts (Eq 9 with r_d)."""
    return _branch_update("review", state, gradient, domain, config)


def mixed_update(
    state: TrainState, recovery: Gradient, review: Gradient, general: Scored, domain: Scored, *, config: TrainConfig
) -> tuple[TrainState, Metrics]:
    """One step along both gradients at once (Eq 3), each weighted by its share of the batch's prompts.

    The control that alternation is measured against. Metrics of each branch stand under its name.
    """
    found = {"recovery": recovery, "review": review}
    parts = {"recovery": general, "review": domain}
    rows = {name: part.index.shape[0] for name, part in parts.items()}
    share = {name: n / sum(rows.values()) for name, n in rows.items()}
    loss = sum(share[name] * gradient.loss for name, gradient in found.items())
    weighted = [jax.tree.map(lambda g, s=share[name]: s * g, gradient.of) for name, gradient in found.items()]
    grads = jax.tree.map(jnp.add, *(pcgrad(*weighted) if config.method.conflict == "pcgrad" else weighted))
    sound = jnp.all(jnp.stack([_rankable(part) for part in parts.values()]))
    state, stats = _take_step(state, loss, grads, sound, "shared", config)
    told = {
        name: {"loss": found[name].loss, "answers": answer_table(part)} | step_statistics(part)
        for name, part in parts.items()
    }
    counts = {name: told["recovery"][name] + told["review"][name] for name in ("prompt_tokens", "response_tokens")}
    return state, {"loss": loss} | counts | stats | told


def pcgrad(g: Params, d: Params) -> tuple[Params, Params]:
    """Two gradients, each without its part against the other (arXiv 2001.06782, Algorithm 1).

    Where `g . d < 0`: `g - (g . d / |d|^2) d` and `d - (g . d / |g|^2) g`; else as they are.
    """
    dot = jnp.minimum(optax.tree.vdot(g, d), 0)
    on_d, on_g = (dot / jnp.maximum(optax.tree.vdot(tree, tree), 1e-30) for tree in (d, g))
    return jax.tree.map(lambda a, b: a - on_d * b, g, d), jax.tree.map(lambda a, b: b - on_g * a, g, d)


def sft_update(
    state: TrainState, gradient: Gradient, batch: SftBatch, *, config: SftConfig
) -> tuple[TrainState, Metrics]:
    """One step of supervised fine-tuning."""
    state, stats = _take_step(state, gradient.loss, gradient.of, jnp.bool_(True), "shared", config)
    counts = {"prompt_tokens": jnp.sum(batch.prompts.lengths), "response_tokens": jnp.sum(batch.lengths)}
    return state, {"loss": gradient.loss} | counts | stats


def _branch_update(
    branch: str, state: TrainState, gradient: Gradient, scored: Scored, config: TrainConfig
) -> tuple[TrainState, Metrics]:
    moments = "shared" if config.method.moments == "shared" else branch
    state, stats = _take_step(state, gradient.loss, gradient.of, _rankable(scored), moments, config)
    return state, {"loss": gradient.loss, "answers": answer_table(scored)} | step_statistics(scored) | stats


def _rankable(scored: Scored) -> jax.Array:
    """Whether every answer could be ranked: one that could not spoils the selection."""
    return jnp.all(jnp.isfinite(scored.selection.score))


def _take_step(
    state: TrainState, loss: jax.Array, grads: Params, sound: jax.Array, moments: str, config: TrainConfig | SftConfig
) -> tuple[TrainState, Metrics]:
    """AdamW where loss and gradient are finite; else parameters and moments stay and the skip is counted."""
    rate = optimizer.learning_rate(config.optimizer, config.steps, state.step)
    sound &= jnp.isfinite(loss)
    params, adam, stats = optimizer.apply(state.params, state.moments[moments], grads, rate, config.optimizer, sound)
    skipped = jnp.where(stats.pop("sound"), 0, state.skipped + 1)
    state = TrainState(state.step + 1, params, state.moments | {moments: adam}, skipped)
    return state, stats | {"skipped": skipped}
