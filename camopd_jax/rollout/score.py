"""Log-probabilities of given answers. No array of shape [B, T, V] exists, forward or backward."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from camopd_jax.rollout.masks import length_mask
from camopd_jax.runtime.mesh import batch_shards, constrain, take_rows
from camopd_jax.types import LanguageModel, Params, Prompts, Residuals

LOGITS_BYTES = 2**28


def join(prompts: Prompts, tokens_BT: jax.Array) -> jax.Array:
    """Prompt and response of each row without a hole between them: int32[B, P + T], right-padded."""
    prompt_slots, slots = prompts.tokens.shape[1], prompts.tokens.shape[1] + tokens_BT.shape[1]
    slot_BS = jnp.arange(slots)[None, :]
    from_response_BS = slot_BS - prompts.lengths[:, None]  # which response token is at this slot
    prompt_BS = jnp.pad(prompts.tokens, ((0, 0), (0, slots - prompt_slots)))
    response_BS = jnp.take_along_axis(tokens_BT, jnp.clip(from_response_BS, 0, tokens_BT.shape[1] - 1), axis=1)
    joined_BS = jnp.where(from_response_BS < 0, prompt_BS, response_BS)
    return jnp.where(from_response_BS < tokens_BT.shape[1], joined_BS, 0)


def join_residuals(prompts: Prompts, residuals: Residuals, slots: int) -> Residuals:
    """The residual stream in the order of `join`, `[B, slots, D]` each, out of the slots of a rollout's cache.

    Behind the last token that entered the cache stands anything finite.
    """
    slot_BS = jnp.arange(slots)[None, :]
    in_prompt_BS = slot_BS < prompts.lengths[:, None]
    cached_BS = jnp.where(in_prompt_BS, slot_BS, slot_BS - prompts.lengths[:, None] + prompts.tokens.shape[1])
    return tuple(jnp.take_along_axis(array, cached_BS[..., None], axis=1, mode="clip") for array in residuals)


def tokens_at_once(chunk: int, vocab: int, tensor: int) -> int:
    """Tokens of a chip whose logits exist at one time: `chunk`; of 0, as many as LOGITS_BYTES hold in float32."""
    return chunk or max(1, LOGITS_BYTES * tensor // (4 * vocab))


def token_log_probs(
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

    Slots are taken a few at a time, so that about `tokens_at_once` tokens' logits (at least one slot of every
    row) exist at once on a chip; where there are several pieces, the backward pass makes them again. The
    head is gathered once for all pieces, and its gradient is reduced over the chips once after them.
    """
    batch, slots = tokens_BT.shape
    rows = -(-batch // batch_shards(model.mesh))  # of one chip
    head = {name: params[name] for name in model.head_axes}
    vocab = jax.eval_shape(model.logits, head, hidden_BTD[0, 0]).shape[-1]
    tensor = 1 if model.mesh is None else model.mesh.shape["tensor"]
    step = min(slots, max(1, tokens_at_once(chunk, vocab, tensor) // rows))
    if step == slots:
        return _piece((model, temperature, with_top), head, hidden_BTD, tokens_BT)
    padding = -slots % step
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0)))
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, padding)))
    return _pieces((model, temperature, with_top), step, head, hidden_BTD, tokens_BT)[:, :slots]


_How = tuple[LanguageModel, float, bool]  # model, temperature, with_top


def _piece(how: _How, head: Params, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """`token_log_probs` of tokens [...] and hidden states [..., D], all at once."""
    model, temperature, with_top = how
    logits = model.logits(head, hidden) / temperature
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    if with_top:
        chosen = jnp.concatenate([chosen, jnp.max(logits, axis=-1, keepdims=True)], axis=-1)
    log_probs = chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return log_probs if with_top else log_probs[..., 0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pieces(how: _How, step: int, head: Params, hidden_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """`_piece`, `step` slots at a time; `step` divides T."""
    batch, slots = tokens_BT.shape
    head = _gathered(how[0], head)

    def log_probs(start: jax.Array) -> jax.Array:
        return _piece(how, head, _slots(hidden_BTD, start, step), _slots(tokens_BT, start, step))

    out = jax.lax.map(log_probs, jnp.arange(0, slots, step))
    return out.swapaxes(0, 1).reshape(batch, slots, *out.shape[3:])


def _pieces_forward(how, step, head, hidden_BTD, tokens_BT):
    return _pieces(how, step, head, hidden_BTD, tokens_BT), (head, hidden_BTD, tokens_BT)


def _pieces_backward(how, step, saved, gradient):
    """Each chip adds up its own rows' gradient of the head, in float32; they meet once, after the last piece."""
    head, hidden_BTD, tokens_BT = saved
    mesh, (batch, slots) = how[0].mesh, tokens_BT.shape
    shards = batch_shards(mesh) if batch % batch_shards(mesh) == 0 else 1
    whole = _gathered(how[0], head)

    def by_shard(array: jax.Array) -> jax.Array:
        """[B, ...] -> [shards, B / shards, ...]"""
        return array.reshape(shards, batch // shards, *array.shape[1:])

    def of_shards(total: Params) -> Params:
        axes = ("batch",) if shards > 1 else (None,)
        return {name: constrain(t, mesh, *axes, *_whole(how[0], name)) for name, t in total.items()}

    def pull(hidden: jax.Array, tokens: jax.Array, gradient: jax.Array) -> tuple[Params, jax.Array]:
        _, back = jax.vjp(lambda head, hidden: _piece(how, head, hidden, tokens), whole, hidden)
        return back(gradient)

    def add(carry: tuple[Params, jax.Array], start: jax.Array) -> tuple[tuple[Params, jax.Array], None]:
        total, to_hidden = carry
        pieces = (_slots(array, start, step) for array in (hidden_BTD, tokens_BT, gradient))
        to_head, piece = jax.vmap(pull)(*map(by_shard, pieces))
        total = of_shards({name: total[name] + to_head[name].astype(jnp.float32) for name in total})
        piece = piece.reshape(batch, step, -1)
        return (total, jax.lax.dynamic_update_slice_in_dim(to_hidden, piece, start, axis=1)), None

    zeros = {name: jnp.zeros((shards, *p.shape), jnp.float32) for name, p in whole.items()}
    carry = of_shards(zeros), jnp.zeros_like(hidden_BTD)
    (total, to_hidden), _ = jax.lax.scan(add, carry, jnp.arange(0, slots, step))
    to_head = {name: jnp.sum(total[name], axis=0).astype(p.dtype) for name, p in head.items()}
    to_head = {name: constrain(g, mesh, *how[0].head_axes[name]) for name, g in to_head.items()}
    return to_head, to_hidden, None


_pieces.defvjp(_pieces_forward, _pieces_backward)


def _whole(model: LanguageModel, name: str) -> tuple[str | None, ...]:
    """Logical axes of a parameter of the head where every chip has its whole width."""
    return tuple(None if axis == "embed" else axis for axis in model.head_axes[name])


def _gathered(model: LanguageModel, head: Params) -> Params:
    """The head as products take it: cast, then whole on every chip but for the vocabulary's split."""
    return {name: constrain(p.astype(model.dtype), model.mesh, *_whole(model, name)) for name, p in head.items()}


def _slots(array: jax.Array, start: jax.Array, step: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, step, axis=1)


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
    so_far: Params | None = None,
    residuals: Residuals = (),
) -> jax.Array:
    """Log-probability of each response token given its prompt and the tokens before it.

    Args:
      tokens_BT: responses, right-padded; lengths_B: their lengths.
      chunk: tokens of a chip whose logits may exist at one time; 0: `tokens_at_once`.
      temperature: the logits are divided by it.
      with_top: also the log-probability of the likeliest token at each place.
      slots: that hold every prompt with its answer; None: P + T.
      so_far, residuals: as of `LanguageModel.hidden`, the latter in the slots of the cache that the answers were made
        with.

    Returns:
      float32[B, T] in nats; 0 in padding. With `with_top` float32[B, T, 2].
    """
    answer_slots = tokens_BT.shape[1]
    joined_BS = join(prompts, tokens_BT)[:, :slots]
    stream = join_residuals(prompts, residuals, joined_BS.shape[1])
    hidden_BSD = model.hidden(params, joined_BS, so_far, stream)
    predicts_BT = (prompts.lengths - 1)[:, None] + jnp.arange(answer_slots)[None, :]
    predicts_BT = jnp.minimum(predicts_BT, joined_BS.shape[1] - 1)
    hidden_BTD = jnp.take_along_axis(hidden_BSD, predicts_BT[..., None], axis=1)
    log_probs_BT = token_log_probs(model, params, hidden_BTD, tokens_BT, chunk, temperature, with_top)
    mask_BT = length_mask(lengths_B, answer_slots)
    return jnp.where(mask_BT[..., None] if with_top else mask_BT, log_probs_BT, 0)


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
