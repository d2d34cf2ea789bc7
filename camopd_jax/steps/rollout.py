"""The student answers: prefill, then one token a turn until every row is done."""

from typing import Any

import jax
import jax.numpy as jnp

from camopd_jax.sharding import constrain
from camopd_jax.steps.sampling import Sampling, sample
from camopd_jax.types import EMPTY, KVCache, LanguageModel, Params, Prompts, Rollout

# The cache grows with the answers: to this many slots beyond the prompt, then twice, four times ...
SEGMENT = 256


def rollout(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    keys_B: jax.Array,
    *,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    max_new: int,
) -> Rollout:
    """Samples an answer of at most `max_new` tokens to each prompt.

    A row ends with its first EOS, which is part of the answer. Token t of a row is drawn with
    `fold_in(key, t)`: an answer depends on its own prompt and key, and on nothing else in the batch.
    Decoding stops when all rows are done, and attends over a cache that grows with the answers, so that
    its cost follows the lengths produced and not the cap.

    Args:
      keys_B: a random key per row (`sampling.row_keys`).
      eos_ids: tokens that end an answer; without any, every answer has `max_new` tokens.
    """
    batch, prompt_slots = prompts.tokens.shape
    params = model.for_decoding(params)
    hidden_BPD, cache = model.prefill(params, prompts.tokens, prompts.lengths)
    last_B11 = (prompts.lengths - 1)[:, None, None]
    state = {
        "turn": jnp.int32(0),
        "hidden": jnp.take_along_axis(hidden_BPD, last_B11, axis=1)[:, 0],  # predicts the next token
        "cache": cache,
        "tokens": jnp.zeros((batch, max_new), jnp.int32),
        "logprobs": jnp.zeros((batch, max_new), jnp.float32),
        "entropy": jnp.zeros((batch,), jnp.float32),  # sum over the answer so far
        "lengths": jnp.zeros((batch,), jnp.int32),
        "stopped": jnp.zeros((batch,), bool),
    }

    def turn(state: dict[str, Any]) -> dict[str, Any]:
        t, running_B = state["turn"], ~state["stopped"]
        logits_BV = model.logits(params, state["hidden"])
        token_B = sample(logits_BV, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, t), sampling)
        token_B = jnp.where(running_B, token_B, 0)
        logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        logp_B = jnp.take_along_axis(logp_BV, token_B[:, None], axis=1)[:, 0]
        entropy_B = -jnp.sum(jnp.where(logp_BV > -jnp.inf, jnp.exp(logp_BV) * logp_BV, 0), axis=-1)
        hidden_BD, cache = model.decode(params, token_B, prompts.lengths + t, state["cache"], prompt_slots + t)
        ended_B = jnp.zeros_like(running_B)
        for eos in eos_ids:
            ended_B |= token_B == eos
        return {
            "turn": t + 1,
            "hidden": hidden_BD,
            "cache": cache,
            "tokens": state["tokens"].at[:, t].set(token_B),
            "logprobs": state["logprobs"].at[:, t].set(jnp.where(running_B, logp_B, 0)),
            "entropy": state["entropy"] + jnp.where(running_B, entropy_B, 0),
            "lengths": state["lengths"] + running_B,
            "stopped": state["stopped"] | (running_B & ended_B),
        }

    end = 0
    while end < max_new:  # unrolled: one compiled loop for each size of the cache
        end = min(max_new, max(SEGMENT, 2 * end))
        state["cache"] = _grow(state["cache"], prompt_slots + end, model)
        state = jax.lax.while_loop(lambda s, end=end: (s["turn"] < end) & ~jnp.all(s["stopped"]), turn, state)
    return Rollout(
        tokens=state["tokens"],
        lengths=state["lengths"],
        logprobs=state["logprobs"],
        entropy=state["entropy"] / state["lengths"],
        stopped=state["stopped"],
    )


def _grow(cache: KVCache, slots: int, model: LanguageModel) -> KVCache:
    """The cache with empty slots behind it, `slots` in all."""
    more = slots - cache.positions.shape[1]

    def pad(array: jax.Array) -> jax.Array:
        array = jnp.pad(array, ((0, 0), (0, 0), (0, more), (0, 0)))
        return constrain(array, model.mesh, "batch", "kv_heads", "sequence", "head_dim")

    positions = jnp.pad(cache.positions, ((0, 0), (0, more)), constant_values=EMPTY)
    return KVCache(tuple(map(pad, cache.keys)), tuple(map(pad, cache.values)), positions)
