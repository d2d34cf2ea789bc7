"""The gradient of a batch's loss, accumulated over micro-batches of rows of similar length.

`add_gradient` is the pure function, and `GradientAccumulator` is the host's loop over it. The layers' gradient
is added to the sum in place (`models/stack.py`). The tree structure of the sum determines which parameters are trained.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from camopd_jax.method.agreement import MONITORS, Agreement
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
    of: Params  # float32, a tree like the trained parameters
    monitors: Record = struct.field(default_factory=dict)  # sums over tokens, float32[], by name; if measured


class LossInputs(struct.PyTreeNode):
    """The inputs of a batch's loss. The weights include all normalisation over the batch, so the result does not depend
    on micro-batches or the mesh.
    """

    sequences: Sequences
    weights: jax.Array  # float32[B, T], constant factors on the loss of each token
    record: Record = struct.field(default_factory=dict)  # the teacher's values that the objective needs
    residuals: Residuals = ()  # residual stream from the rollout, under the same parameters; (): do a forward pass


class MicroBatchRows(struct.PyTreeNode):
    """Row numbers of K micro-batches of the same width."""

    rows: jax.Array | np.ndarray  # int32[K, M], row numbers in the batch; B: no row
    count: jax.Array | np.int32  # int32[], only the first `count` micro-batches are computed; 1 if K = 1


@dataclass(frozen=True)
class Loss:
    """The static part of the function to differentiate."""

    model: LanguageModel
    objective: Objective
    teacher: LanguageModel | None = None  # if the objective needs the teacher's logits
    agreement: Agreement | None = None  # monitors to measure

    def of_tokens(self, logits: jax.Array, targets: Record) -> Record:
        """Each token's "loss" and monitors, float32[...] by name; arguments as for `Objective.loss`."""
        measured = {} if self.agreement is None else self.agreement.measure(logits, targets)
        return {"loss": self.objective.loss(logits, targets)} | measured


def zero_gradient(params: Params, monitors: Sequence[str] = ()) -> Gradient:
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return Gradient(jnp.float32(0), zeros, {name: jnp.float32(0) for name in monitors})


def weighted_loss(
    loss: Loss,
    params: Params,
    inputs: LossInputs,
    teacher_head: Params,
    widths: Widths,
    layers_so_far: Params | None = None,
) -> tuple[jax.Array, Record]:
    """`sum weight loss` over the tokens of all rows, float32[]; and each row's sums of monitors, float32[B] by name.

    Args:
      teacher_head: parameters of the teacher's output head, if `loss` has a teacher.
      layers_so_far: `so_far` of `LanguageModel.hidden`.
    """
    sequences, cut = inputs.sequences, widths.answer_slots
    sequences = sequences.replace(tokens=sequences.tokens[:, :cut])
    hidden = predicting_states(loss.model, params, sequences, widths.slots, layers_so_far, inputs.residuals)
    targets = {name: array[:, :cut] for name, array in inputs.record.items()} | {"tokens": sequences.tokens}
    function = TokenFunction(loss.model, loss.of_tokens, loss.teacher)
    values = map_tokens(function, params, hidden, targets, widths.chunk, teacher_head)
    mask = length_mask(sequences.lengths, cut)
    losses = jnp.where(mask, values.pop("loss"), 0)
    monitors = {name: jnp.sum(jnp.where(mask, value, 0), axis=1) for name, value in values.items()}
    return jnp.sum(inputs.weights[:, :cut] * losses), monitors


def add_gradient(
    loss: Loss,
    params: Params,
    so_far: Gradient,
    inputs: LossInputs,
    teacher_head: Params,
    micro_batches: MicroBatchRows,
    *,
    widths: Widths,
) -> Gradient:
    """Adds `weighted_loss` of these rows and its gradient to `so_far`.

    Args:
      params: all parameters of the model.
      so_far: the sum over earlier micro-batches; its tree has only the trained parameters.
    """
    batch_rows = len(inputs.sequences.lengths)
    others = subset(params, {name: tree for name, tree in so_far.of.items() if name != "layers"})

    def of_rows(others: Params, layers_so_far: Params, rows_M: jax.Array) -> tuple[jax.Array, Record]:
        part, present_M = take_rows(inputs, rows_M, loss.model.mesh), rows_M < batch_rows
        part = part.replace(weights=jnp.where(present_M[:, None], part.weights, 0))
        value, monitors = weighted_loss(loss, merge(params, others), part, teacher_head, widths, layers_so_far)
        return value, {name: jnp.sum(jnp.where(present_M, sums, 0)) for name, sums in monitors.items()}

    def add(k: jax.Array | int, so_far: Gradient) -> Gradient:
        layers_so_far = so_far.of.get("layers", {})
        differentiate = jax.value_and_grad(of_rows, argnums=(0, 1), has_aux=True)
        (value, monitors), (grads, layers) = differentiate(others, layers_so_far, micro_batches.rows[k])
        sums = {name: so_far.monitors[name] + monitors[name] for name in monitors}
        total = {
            name: jax.tree.map(lambda a, g: a + g.astype(jnp.float32), so_far.of[name], grads[name]) for name in grads
        }
        return Gradient(so_far.loss + value, total | ({"layers": layers} if "layers" in so_far.of else {}), sums)

    if len(micro_batches.rows) == 1:
        return add(0, so_far)
    return jax.lax.fori_loop(0, micro_batches.count, add, so_far)


class GradientAccumulator:
    """The compiled functions that accumulate a gradient.

    On a CPU, micro-batches of the same width are computed in one call with a loop inside: memory is allocated by the
    system for each call, which takes a twentieth of the gradient's time. On accelerators each micro-batch is one call:
    their memory is pooled, and a loop would keep the cast parameters in memory.
    """

    def __init__(self, loss: Loss, shardings: Params | None, chunk: int, in_one_call: bool | None = None):
        """
        Args:
          shardings: of the trained parameters; None: one device.
          chunk: tokens per chip whose logits exist at a time.
          in_one_call: whether micro-batches of the same width are computed in one call; None: only on a CPU.
        """
        mesh = loss.model.mesh
        self.loss, self._chunk = loss, chunk
        self._in_one_call = platform(mesh) == "cpu" if in_one_call is None else in_one_call
        everywhere: Any = None if mesh is None else sharding(mesh)
        names = () if loss.agreement is None else MONITORS
        place = None if mesh is None else Gradient(everywhere, shardings, dict.fromkeys(names, everywhere))
        self.begin = jax.jit(partial(zero_gradient, monitors=names), out_shardings=place)
        self.add = jax.jit(
            add_gradient, static_argnums=0, static_argnames="widths", donate_argnums=2, out_shardings=place
        )

    def __call__(
        self,
        params: Params,
        trained: Params,
        inputs: LossInputs,
        parts: Iterable[MicroBatch],
        teacher_head: Params | None = None,
    ) -> Gradient:
        """`add_gradient` over all micro-batches.

        Args:
          params: all parameters of the model. trained: the subset to differentiate.
        """
        trim_heap(self.loss.model.mesh)
        gradient = self.begin(trained)
        batch = len(inputs.sequences.lengths)
        for part, rows in self.calls(parts, batch):
            widths = part.widths(self._chunk)
            gradient = self.add(self.loss, params, gradient, inputs, teacher_head or {}, rows, widths=widths)
        return gradient

    def calls(self, parts: Iterable[MicroBatch], batch: int) -> Iterator[tuple[MicroBatch, MicroBatchRows]]:
        """The calls of `add`: for each, a micro-batch with its widths, and the rows. `batch`: number of rows."""
        if self._in_one_call:
            return join_micro_batches(parts, batch)
        return ((part, MicroBatchRows(part.rows[None], np.int32(1))) for part in parts)


def join_micro_batches(parts: Iterable[MicroBatch], batch: int) -> Iterator[tuple[MicroBatch, MicroBatchRows]]:
    """Joins consecutive micro-batches of the same size and width: yields the first one, and the rows of all.

    K is always the number that a complete batch would have, so that a program compiles only once for each width.
    """
    for _, group in itertools.groupby(parts, key=lambda p: (p.slots, p.answer_slots, len(p.rows))):
        neighbours = list(group)
        rows = np.stack([part.rows for part in neighbours])
        missing = -(-batch // rows.shape[1]) - len(neighbours)
        padded = np.pad(rows, ((0, missing), (0, 0)), constant_values=batch)
        yield neighbours[0], MicroBatchRows(padded, np.int32(len(neighbours)))
