"""The two updates of CaMOPD, their mixture and supervised fine-tuning: one weighted log-likelihood.

`recovery_update` and `review_update` are compiled apart and share no gradient. Their cost follows what
was selected: rows go in selection order, in micro-batches, and the loop ends with the last selected one.
"""

import jax
import jax.numpy as jnp
import optax

from camopd_jax import optim
from camopd_jax.config import SftConfig, TrainConfig
from camopd_jax.masked import length_mask
from camopd_jax.sharding import constrain
from camopd_jax.steps.losses import token_weights
from camopd_jax.steps.score import score
from camopd_jax.steps.statistics import answer_table, step_statistics
from camopd_jax.types import LanguageModel, Params, Prompts, Scored, SftBatch, TrainState

Metrics = dict[str, jax.Array]


def recovery_update(
    state: TrainState, general: Scored, *, model: LanguageModel, config: TrainConfig
) -> tuple[TrainState, Metrics]:
    """One step toward the original model on general prompts (Eq 9 with r_g)."""
    return _branch_update("recovery", state, general, model, config)


def review_update(
    state: TrainState, domain: Scored, *, model: LanguageModel, config: TrainConfig
) -> tuple[TrainState, Metrics]:
    """One step toward the specialised model on domain prompts (Eq 9 with r_d)."""
    return _branch_update("review", state, domain, model, config)


def mixed_update(
    state: TrainState, general: Scored, domain: Scored, *, model: LanguageModel, config: TrainConfig
) -> tuple[TrainState, Metrics]:
    """One step along both gradients at once (Eq 3), each weighted by its share of the batch's prompts.

    The control that alternation is measured against. Metrics of each branch stand under its name.
    """
    rows = {"recovery": general.index.shape[0], "review": domain.index.shape[0]}
    parts = {"recovery": general, "review": domain}
    share = {name: n / sum(rows.values()) for name, n in rows.items()}
    found = {name: _branch_gradient(name, state.params, part, model, config) for name, part in parts.items()}
    loss = sum(share[name] * value for name, (value, _) in found.items())
    weighted = [jax.tree.map(lambda g, s=share[name]: s * g, gradient) for name, (_, gradient) in found.items()]
    grads = jax.tree.map(jnp.add, *(pcgrad(*weighted) if config.method.conflict == "pcgrad" else weighted))
    sound = jnp.all(jnp.stack([_rankable(part) for part in parts.values()]))
    state, stats = _take_step(state, loss, grads, sound, "shared", config)
    told = {
        name: {"loss": found[name][0], "answers": answer_table(part)} | step_statistics(part)
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
    state: TrainState, batch: SftBatch, *, model: LanguageModel, config: SftConfig
) -> tuple[TrainState, Metrics]:
    """One step of cross-entropy on the answers, mean over the batch's answer tokens."""
    rows, slots = batch.tokens.shape
    tokens = jnp.sum(batch.lengths)
    weights_BT = length_mask(batch.lengths, slots) / tokens.astype(jnp.float32)
    loss, grads = _likelihood_gradient(
        model, state.params, batch.prompts, batch.tokens, batch.lengths, weights_BT, jnp.arange(rows), jnp.int32(rows),
        config.optimizer.micro_batch, config.compute.logits_chunk,
    )  # fmt: skip
    state, stats = _take_step(state, loss, grads, jnp.bool_(True), "shared", config)
    counts = {"prompt_tokens": jnp.sum(batch.prompts.lengths), "response_tokens": tokens}
    return state, {"loss": loss} | counts | stats


def _branch_update(
    branch: str, state: TrainState, scored: Scored, model: LanguageModel, config: TrainConfig
) -> tuple[TrainState, Metrics]:
    loss, grads = _branch_gradient(branch, state.params, scored, model, config)
    moments = "shared" if config.method.moments == "shared" else branch
    state, stats = _take_step(state, loss, grads, _rankable(scored), moments, config)
    return state, {"loss": loss, "answers": answer_table(scored)} | step_statistics(scored) | stats


def _branch_gradient(
    branch: str, params: Params, scored: Scored, model: LanguageModel, config: TrainConfig
) -> tuple[jax.Array, Params]:
    """Loss and gradient of Eq 9 on a branch's selected answers."""
    prompts, rollout, selection = scored.prompts, scored.rollout, scored.selection
    weights_BT = token_weights(scored.scores, rollout, selection, config.method, getattr(config.method, branch))
    return _likelihood_gradient(
        model, params, prompts, rollout.tokens, rollout.lengths, weights_BT, selection.order, selection.count,
        config.optimizer.micro_batch, config.compute.logits_chunk,
    )  # fmt: skip


def _rankable(scored: Scored) -> jax.Array:
    """Whether every answer could be ranked: one that could not spoils the selection."""
    return jnp.all(jnp.isfinite(scored.selection.score))


def _likelihood_gradient(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    weights_BT: jax.Array,
    order_B: jax.Array,
    count: jax.Array,
    micro_batch: int,
    chunk: int,
) -> tuple[jax.Array, Params]:
    """`-sum weight log pi` over the first `count` rows of `order_B`, and its float32 gradient.

    The weights already hold every normalisation over the whole batch: how it is cut into micro-batches,
    or spread over devices, changes nothing.
    """

    def micro_step(i: jax.Array, sums: tuple[jax.Array, Params]) -> tuple[jax.Array, Params]:
        place_M = i * micro_batch + jnp.arange(micro_batch)
        rows_M = order_B[jnp.minimum(place_M, order_B.shape[0] - 1)]
        taken_M = place_M < count

        def take(array: jax.Array) -> jax.Array:
            array = array[rows_M]
            return constrain(array, model.mesh, "batch", *(None,) * (array.ndim - 1))

        micro = Prompts(take(prompts.tokens), take(prompts.lengths))
        tokens_MT, lengths_M = take(tokens_BT), take(lengths_B)
        weights_MT = jnp.where(taken_M[:, None], take(weights_BT), 0)

        def loss(params: Params) -> jax.Array:
            return -jnp.sum(weights_MT * score(model, params, micro, tokens_MT, lengths_M, chunk))

        value, grads = jax.value_and_grad(loss)(params)
        return sums[0] + value, jax.tree.map(lambda a, g: a + g.astype(jnp.float32), sums[1], grads)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    micro_batches = (count + micro_batch - 1) // micro_batch
    return jax.lax.fori_loop(0, micro_batches, micro_step, (jnp.float32(0), zeros))


def _take_step(
    state: TrainState, loss: jax.Array, grads: Params, sound: jax.Array, moments: str, config: TrainConfig | SftConfig
) -> tuple[TrainState, Metrics]:
    """AdamW where loss and gradient are finite; else parameters and moments stay and the skip is counted."""
    rate = optim.learning_rate(config.optimizer, config.steps, state.step)
    params, adam, stats = optim.apply(state.params, state.moments[moments], grads, rate, config.optimizer)
    sound &= jnp.isfinite(loss) & jnp.isfinite(stats["grad_norm"])
    params, adam = jax.tree.map(
        lambda new, old: jnp.where(sound, new, old), (params, adam), (state.params, state.moments[moments])
    )
    skipped = jnp.where(sound, 0, state.skipped + 1)
    state = TrainState(state.step + 1, params, state.moments | {moments: adam}, skipped)
    return state, stats | {"skipped": skipped}
