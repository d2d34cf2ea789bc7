"""The gradient of a batch's loss, a few rows of like length at a time.

`add_gradient` is the pure function; `Learner` is the host's loop over it. The gradient of the layers is added where the
sum so far lies (`models/stack.py`); the tree of the sum says which parameters are trained.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from camopd_jax.method.objectives import Objective
from camopd_jax.models.partition import merge, subset
from camopd_jax.rollout.head import TokenFunction, map_tokens
from camopd_jax.rollout.masks import length_mask
from camopd_jax.rollout.score import predicting_states, trim_heap
from camopd_jax.runtime.buckets import MicroBatch, Widths
from camopd_jax.runtime.mesh import platform, sharding, take_rows
from camopd_jax.types import LanguageModel, Params, Record, Residuals, Sequences


class Gradient(struct.PyTreeNode):
    """A loss summed over answers, and its gradient."""

    loss: jax.Array  # float32[]
    of: Params  # float32, like the trained parameters


class Lesson(struct.PyTreeNode):
    """Answers to learn from. The weights hold every normalisation over the whole batch: how it is cut into
    micro-batches, or spread over devices, changes nothing.
    """

    sequences: Sequences
    weights: jax.Array  # float32[B, T], constants on the loss of each token
    record: Record = struct.field(default_factory=dict)  # of the teacher, what the objective keeps
    residuals: Residuals = ()  # of the tokens under the parameters, as a rollout kept them; (): there is a forward pass


class Rows(struct.PyTreeNode):
    """Micro-batches of one width."""

    rows: jax.Array | np.ndarray  # int32[K, M], of the batch; one beyond the last stands for no row
    count: jax.Array | np.int32  # int32[], the first `count` of the K are taken; of K = 1 that one


@dataclass(frozen=True)
class Loss:
    """What is differentiated: static."""

    model: LanguageModel
    objective: Objective
    teacher: LanguageModel | None = None  # where the objective asks for the teacher's logits


def zero_gradient(params: Params) -> Gradient:
    return Gradient(jnp.float32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))


def weighted_loss(
    loss: Loss,
    params: Params,
    lesson: Lesson,
    teacher_head: Params,
    widths: Widths,
    layers_so_far: Params | None = None,
) -> jax.Array:
    """`sum weight loss` over the tokens of all rows, float32[].

    Args:
      teacher_head: the teacher's parameters of its output head, where `loss` has a teacher.
      layers_so_far: as of `LanguageModel.hidden`: then the derivative by it is it and the layers' gradient.
    """
    sequences, cut = lesson.sequences, widths.answer_slots
    sequences = sequences.replace(tokens=sequences.tokens[:, :cut])
    hidden = predicting_states(loss.model, params, sequences, widths.slots, layers_so_far, lesson.residuals)
    targets = {name: array[:, :cut] for name, array in lesson.record.items()} | {"tokens": sequences.tokens}
    function = TokenFunction(loss.model, loss.objective.loss, loss.teacher)
    losses = map_tokens(function, params, hidden, targets, widths.chunk, teacher_head)
    losses = jnp.where(length_mask(sequences.lengths, cut), losses, 0)
    return jnp.sum(lesson.weights[:, :cut] * losses)


def add_gradient(
    loss: Loss,
    params: Params,
    so_far: Gradient,
    lesson: Lesson,
    teacher_head: Params,
    micro_batches: Rows,
    *,
    widths: Widths,
) -> Gradient:
    """`so_far` and, of these rows, `weighted_loss` and its gradient.

    Args:
      params: all of the model.
      so_far: its tree has the trained parameters.
    """
    batch_rows = len(lesson.sequences.lengths)
    others = subset(params, {name: tree for name, tree in so_far.of.items() if name != "layers"})

    def of_rows(others: Params, layers_so_far: Params, rows_M: jax.Array) -> jax.Array:
        part = take_rows(lesson, rows_M, loss.model.mesh)
        part = part.replace(weights=jnp.where((rows_M < batch_rows)[:, None], part.weights, 0))
        return weighted_loss(loss, merge(params, others), part, teacher_head, widths, layers_so_far)

    def add(k: jax.Array | int, so_far: Gradient) -> Gradient:
        layers_so_far = so_far.of.get("layers", {})
        differentiate = jax.value_and_grad(of_rows, argnums=(0, 1))
        value, (grads, layers) = differentiate(others, layers_so_far, micro_batches.rows[k])
        total = {
            name: jax.tree.map(lambda a, g: a + g.astype(jnp.float32), so_far.of[name], grads[name]) for name in grads
        }
        return Gradient(so_far.loss + value, total | ({"layers": layers} if "layers" in so_far.of else {}))

    if len(micro_batches.rows) == 1:
        return add(0, so_far)
    return jax.lax.fori_loop(0, micro_batches.count, add, so_far)


class Learner:
    """The compiled parts of a gradient.

    On a CPU micro-batches of like widths are one call: every call gets its memory from the system page by page, a
    twentieth of a gradient's time. Accelerators pool theirs, and there a loop would keep what is the same in each turn
    (parameters cast) beside all else.
    """

    def __init__(self, loss: Loss, shardings: Params | None, chunk: int, in_one_call: bool | None = None):
        """
        Args:
          shardings: of the trained parameters; None: one device.
          chunk: tokens of a chip whose logits may exist at one time.
          in_one_call: whether micro-batches of like widths are; None: on a CPU.
        """
        mesh = loss.model.mesh
        self.loss, self._chunk = loss, chunk
        self._in_one_call = platform(mesh) == "cpu" if in_one_call is None else in_one_call
        everywhere: Any = None if mesh is None else sharding(mesh)
        place = None if mesh is None else Gradient(everywhere, shardings)
        self.begin = jax.jit(zero_gradient, out_shardings=place)
        self.add = jax.jit(
            add_gradient, static_argnums=0, static_argnames="widths", donate_argnums=2, out_shardings=place
        )

    def __call__(
        self,
        params: Params,
        trained: Params,
        lesson: Lesson,
        parts: Iterable[MicroBatch],
        teacher_head: Params | None = None,
    ) -> Gradient:
        """`add_gradient` over all micro-batches.

        Args:
          params: all of the model. trained: those that are differentiated, a part of them.
        """
        trim_heap(self.loss.model.mesh)
        gradient = self.begin(trained)
        batch = len(lesson.sequences.lengths)
        for part, rows in self.calls(parts, batch):
            widths = part.widths(self._chunk)
            gradient = self.add(self.loss, params, gradient, lesson, teacher_head or {}, rows, widths=widths)
        return gradient

    def calls(self, parts: Iterable[MicroBatch], batch: int) -> Iterator[tuple[MicroBatch, Rows]]:
        """The micro-batches of a batch of so many rows, as `add` takes them: of each call the widest, and its rows."""
        if self._in_one_call:
            return alike(parts, batch)
        return ((part, Rows(part.rows[None], np.int32(1))) for part in parts)


def alike(parts: Iterable[MicroBatch], batch: int) -> Iterator[tuple[MicroBatch, Rows]]:
    """Neighbours of one size and of one width: the first, and the rows of all.

    K is what a whole batch would make, however many there are: a program compiles once for each width.
    """
    for _, group in itertools.groupby(parts, key=lambda p: (p.slots, p.answer_slots, len(p.rows))):
        neighbours = list(group)
        rows = np.stack([part.rows for part in neighbours])
        missing = -(-batch // rows.shape[1]) - len(neighbours)
        padded = np.pad(rows, ((0, missing), (0, 0)), constant_values=batch)
        yield neighbours[0], Rows(padded, np.int32(len(neighbours)))
