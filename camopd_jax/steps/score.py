"""Log-probabilities of given answers. No array of shape [B, T, V] exists, forward or backward."""

from typing import Any

import jax
import jax.numpy as jnp

from camopd_jax.masked import length_mask
from camopd_jax.sharding import constrain, take_rows
from camopd_jax.types import LanguageModel, Params, Prompts


def join(prompts: Prompts, tokens_BT: jax.Array) -> jax.Array:
    """Prompt and response of each row without a hole between them: int32[B, P + T], right-padded."""
    prompt_slots, slots = prompts.tokens.shape[1], prompts.tokens.shape[1] + tokens_BT.shape[1]
    slot_BS = jnp.arange(slots)[None, :]
    from_response_BS = slot_BS - prompts.lengths[:, None]  # which response token is at this slot
    prompt_BS = jnp.pad(prompts.tokens, ((0, 0), (0, slots - prompt_slots)))
    response_BS = jnp.take_along_axis(tokens_BT, jnp.clip(from_response_BS, 0, tokens_BT.shape[1] - 1), axis=1)
    joined_BS = jnp.where(from_response_BS < 0, prompt_BS, response_BS)
    return jnp.where(from_response_BS < tokens_BT.shape[1], joined_BS, 0)


def token_logprobs(
    model: LanguageModel,
    params: Params,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    chunk: int,
    temperature: float = 1.0,
    with_top: bool = False,
) -> jax.Array:
    """log softmax(logits)[token] in nats, float32[B, T], of the tokens that the hidden states predict.

    With `with_top` float32[B, T, 2]: beside it that of the likeliest token.

    Slots are taken a few at a time, so that about `chunk` tokens' logits (at least one slot of every
    row) exist at once; where there are several pieces, the backward pass makes them again.
    """
    batch, slots, width = hidden_BTD.shape
    step = min(slots, max(1, chunk // batch))
    steps = -(-slots // step)
    padding = steps * step - slots

    def piece(hidden: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = model.logits(params, hidden) / temperature
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
        if with_top:
            chosen = jnp.concatenate([chosen, jnp.max(logits, axis=-1, keepdims=True)], axis=-1)
        logprobs = chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return logprobs if with_top else logprobs[..., 0]

    if steps == 1:
        return piece(hidden_BTD, tokens_BT)
    hidden = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0))).reshape(batch, steps, step, width).swapaxes(0, 1)
    tokens = jnp.pad(tokens_BT, ((0, 0), (0, padding))).reshape(batch, steps, step).swapaxes(0, 1)
    logprobs = jax.lax.map(lambda xs: jax.checkpoint(piece)(*xs), (hidden, tokens))
    return logprobs.swapaxes(0, 1).reshape(batch, steps * step, *logprobs.shape[3:])[:, :slots]


def score(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    chunk: int,
    temperature: float = 1.0,
    with_top: bool = False,
    slots: int | None = None,
) -> jax.Array:
    """Log-probability of each response token given its prompt and the tokens before it.

    Args:
      tokens_BT: responses, right-padded; lengths_B: their lengths.
      chunk: tokens whose logits may exist at one time.
      temperature: the logits are divided by it.
      with_top: also the log-probability of the likeliest token at each place.
      slots: that hold every prompt with its answer; None: P + T.

    Returns:
      float32[B, T] in nats; 0 in padding. With `with_top` float32[B, T, 2].
    """
    answer_slots = tokens_BT.shape[1]
    joined_BS = join(prompts, tokens_BT)[:, :slots]
    hidden_BSD = model.hidden(params, joined_BS)
    predicts_BT = (prompts.lengths - 1)[:, None] + jnp.arange(answer_slots)[None, :]
    predicts_BT = jnp.minimum(predicts_BT, joined_BS.shape[1] - 1)
    hidden_BTD = jnp.take_along_axis(hidden_BSD, predicts_BT[..., None], axis=1)
    logprobs_BT = token_logprobs(model, params, hidden_BTD, tokens_BT, chunk, temperature, with_top)
    mask_BT = length_mask(lengths_B, answer_slots)
    return jnp.where(mask_BT[..., None] if with_top else mask_BT, logprobs_BT, 0)


def score_rows(
    model: LanguageModel,
    params: Params,
    scored: jax.Array,
    prompts: Prompts,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    rows_M: jax.Array,
    *,
    slots: int,
    answer_slots: int,
    **options: Any,
) -> jax.Array:
    """`scored`, as `score` returns it for the whole batch, with the scores of these rows put in.

    Args:
      rows_M: of the batch; one beyond the last stands for nobody.
      slots, answer_slots: that hold these rows' longest prompt and answer together, and longest answer.
      options: of `score`.
    """
    some, tokens_MT, lengths_M = take_rows((prompts, tokens_BT[:, :answer_slots], lengths_B), rows_M, model.mesh)
    found = score(model, params, some, tokens_MT, lengths_M, slots=slots, **options)
    found = jnp.pad(found, [(0, 0), (0, scored.shape[1] - answer_slots)] + [(0, 0)] * (scored.ndim - 2))
    scored = scored.at[rows_M].set(found, mode="drop")
    return constrain(scored, model.mesh, "batch", *(None,) * (scored.ndim - 1))
