"""The output head, applied to chunks of tokens: no array of shape [B, T, V] exists in the forward or backward pass.

`map_tokens` applies a function to the logits of every token, for instance a log-probability or a loss. If there are
several chunks, the backward pass recomputes their logits. The head's weights are gathered once before all chunks, and
their gradient is summed over the chips once after them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from camopd_jax.runtime.mesh import batch_shards, constrain
from camopd_jax.types import LanguageModel, Params, Record

LOGITS_BYTES = 2**28


@dataclass(frozen=True)
class TokenFunction:
    """A function of each token's logits. Hashable: a static argument of compiled functions.

    `call(logits, targets)` maps float32[..., V] and the targets' arrays [..., ...] to arrays [..., ...].
    """

    model: LanguageModel
    call: Callable[[jax.Array, Record], Any]
    # If given, the targets of `call` have this model's logits "teacher_logits" instead of its "hidden" states
    teacher: LanguageModel | None = None


def tokens_at_once(chunk: int, vocab: int, tensor: int) -> int:
    """Tokens per chip whose logits exist at a time: `chunk`; if it is 0, as many as fit LOGITS_BYTES in float32."""
    return chunk or max(1, LOGITS_BYTES * tensor // (4 * vocab))


def map_tokens(
    function: TokenFunction,
    params: Params,
    hidden_BTD: jax.Array,
    targets: Record,
    chunk: int,
    teacher_head: Params | None = None,
) -> Any:
    """Applies `function.call` to the logits of every token.

    Args:
      params: of the model; only those of the head are read.
      hidden_BTD: final hidden states; the one at [b, t] predicts `targets["tokens"][b, t]`.
      targets: arrays [B, T, ...], constants: "tokens" and others that the function needs.
      chunk: tokens per chip whose logits exist at a time; 0: `tokens_at_once`. It is at least one slot of every row.
      teacher_head: parameters of the teacher's head, if the function has a teacher; constants.

    Returns:
      Arrays [B, T, ...] in the structure that the function returns.
    """
    model, (batch, slots) = function.model, hidden_BTD.shape[:2]
    rows = -(-batch // batch_shards(model.mesh))  # per chip
    head = head_params(model, params)
    vocab = jax.eval_shape(model.logits, head, hidden_BTD[0, 0]).shape[-1]
    tensor = 1 if model.mesh is None else model.mesh.shape["tensor"]
    step = min(slots, max(1, tokens_at_once(chunk, vocab, tensor) // rows))
    step = -(-slots // -(-slots // step))  # as many chunks, of equal size: less padding
    teacher_head = teacher_head or {}
    if step == slots:
        return apply_to_tokens(function, head, hidden_BTD, targets, teacher_head)
    padding = -slots % step
    hidden_BTD, targets = jax.tree.map(lambda array: _pad_slots(array, padding), (hidden_BTD, targets))
    mapped = _in_chunks(function, step, head, hidden_BTD, targets, teacher_head)
    return jax.tree.map(lambda array: array[:, :slots], mapped)


def head_params(model: LanguageModel, params: Params) -> Params:
    """The parameters that `model.logits` reads."""
    return {name: params[name] for name in model.head_axes}


def _pad_slots(array: jax.Array, padding: int) -> jax.Array:
    return jnp.pad(array, ((0, 0), (0, padding), *((0, 0),) * (array.ndim - 2)))


def apply_to_tokens(
    function: TokenFunction, head: Params, hidden: jax.Array, targets: Record, teacher_head: Params
) -> Any:
    """Applies the function to all tokens [...] and hidden states [..., D] at once."""
    if function.teacher is not None:
        rest = {name: array for name, array in targets.items() if name != "hidden"}
        targets = rest | {"teacher_logits": function.teacher.logits(teacher_head, targets["hidden"])}
    return function.call(function.model.logits(head, hidden), targets)


_Saved = tuple[Params, jax.Array, Record, Params]  # the arguments of `_in_chunks` that are not static


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(
    function: TokenFunction, step: int, head: Params, hidden_BTD: jax.Array, targets: Record, teacher_head: Params
) -> Any:
    """`apply_to_tokens` to `step` slots at a time; `step` divides T."""
    batch, slots = hidden_BTD.shape[:2]
    head = _gathered(function.model, head)
    teacher_head = _gathered(function.teacher, teacher_head) if function.teacher else {}

    def at(start: jax.Array) -> Any:
        hidden, of_tokens = jax.tree.map(lambda array: _slots(array, start, step), (hidden_BTD, targets))
        return apply_to_tokens(function, head, hidden, of_tokens, teacher_head)

    chunks = jax.lax.map(at, jnp.arange(0, slots, step))
    return jax.tree.map(lambda array: array.swapaxes(0, 1).reshape(batch, slots, *array.shape[3:]), chunks)


def _forward(
    function: TokenFunction, step: int, head: Params, hidden_BTD: jax.Array, targets: Record, teacher_head: Params
) -> tuple[Any, _Saved]:
    mapped = _in_chunks(function, step, head, hidden_BTD, targets, teacher_head)
    return mapped, (head, hidden_BTD, targets, teacher_head)


def _backward(function: TokenFunction, step: int, saved: _Saved, gradient: Any) -> tuple[Params, jax.Array, None, None]:
    """Each chip sums the head's gradient over its rows in float32; the sum over chips is done once, at the end."""
    head, hidden_BTD, targets, teacher_head = saved
    model, (batch, slots) = function.model, hidden_BTD.shape[:2]
    shards = batch_shards(model.mesh) if batch % batch_shards(model.mesh) == 0 else 1
    gathered = _gathered(model, head)
    teacher_head = _gathered(function.teacher, teacher_head) if function.teacher else {}

    def by_shard(array: jax.Array) -> jax.Array:
        """[B, ...] -> [shards, B / shards, ...]"""
        return array.reshape(shards, batch // shards, *array.shape[1:])

    def of_shards(total: Params) -> Params:
        axes = ("batch",) if shards > 1 else (None,)
        return {name: constrain(t, model.mesh, *axes, *_gathered_axes(model, name)) for name, t in total.items()}

    def pull(hidden: jax.Array, of_tokens: Record, gradient: Any) -> tuple[Params, jax.Array]:
        def call(head: Params, hidden: jax.Array) -> Any:
            return apply_to_tokens(function, head, hidden, of_tokens, teacher_head)

        return jax.vjp(call, gathered, hidden)[1](gradient)

    def add(carry: tuple[Params, jax.Array], start: jax.Array) -> tuple[tuple[Params, jax.Array], None]:
        total, to_hidden = carry
        chunk = jax.tree.map(lambda array: by_shard(_slots(array, start, step)), (hidden_BTD, targets, gradient))
        to_head, piece = jax.vmap(pull)(*chunk)
        total = of_shards({name: total[name] + to_head[name].astype(jnp.float32) for name in total})
        piece = piece.reshape(batch, step, -1)
        return (total, jax.lax.dynamic_update_slice_in_dim(to_hidden, piece, start, axis=1)), None

    zeros = {name: jnp.zeros((shards, *p.shape), jnp.float32) for name, p in gathered.items()}
    carry = of_shards(zeros), jnp.zeros_like(hidden_BTD)
    (total, to_hidden), _ = jax.lax.scan(add, carry, jnp.arange(0, slots, step))
    to_head = {name: jnp.sum(total[name], axis=0).astype(p.dtype) for name, p in head.items()}
    to_head = {name: constrain(g, model.mesh, *model.head_axes[name]) for name, g in to_head.items()}
    return to_head, to_hidden, None, None


_in_chunks.defvjp(_forward, _backward)


def _gathered_axes(model: LanguageModel, name: str) -> tuple[str | None, ...]:
    """Logical axes of a parameter of the head after the gather: the model width is not split."""
    return tuple(None if axis == "embed" else axis for axis in model.head_axes[name])


def _gathered(model: LanguageModel, head: Params) -> Params:
    """The head for matrix products: cast, then gathered on every chip except over the vocabulary."""
    return {
        name: constrain(p.astype(model.dtype), model.mesh, *_gathered_axes(model, name)) for name, p in head.items()
    }


def _slots(array: jax.Array, start: jax.Array, step: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, step, axis=1)
