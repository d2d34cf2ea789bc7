"""The gradient of a batch, a few rows of like length at a time: the host's loop over `update.add_gradient`."""

import itertools
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from camopd_jax.method.update import Gradient, add_gradient, no_gradient
from camopd_jax.rollout.buckets import MicroBatch
from camopd_jax.rollout.scoring import WIDTHS, give_back
from camopd_jax.runtime.mesh import platform, sharding
from camopd_jax.types import LanguageModel, Params, Prompts, Residuals


class Learning:
    """The compiled parts of a gradient, for parameters that lie in these places.

    On a CPU micro-batches of like widths are one call: every call gets its memory from the system page by page, a
    twentieth of a gradient's time. Accelerators pool theirs, and there a loop would keep what is the same in each turn
    (parameters cast) beside all else.
    """

    def __init__(self, model: LanguageModel, places: Params, chunk: int, in_one_call: bool | None = None):
        """`in_one_call`: micro-batches of like widths; None: on a CPU."""
        self._model, self._chunk = model, chunk
        self._in_one_call = platform(model.mesh) == "cpu" if in_one_call is None else in_one_call
        whole = None if model.mesh is None else Gradient(sharding(model.mesh), places)
        self.begin = jax.jit(no_gradient, out_shardings=whole)
        self.add = jax.jit(
            add_gradient, static_argnums=0, static_argnames=WIDTHS, donate_argnums=2, out_shardings=whole
        )

    def __call__(
        self,
        params: Params,
        prompts: Prompts,
        tokens_BT: jax.Array,
        lengths_B: jax.Array,
        weights_BT: jax.Array,
        pieces: Iterable[MicroBatch],
        residuals: Residuals = (),
    ) -> Gradient:
        """`update.add_gradient` over all pieces."""
        give_back(self._model.mesh)
        gradient = self.begin(params)
        calls = alike(pieces, len(lengths_B)) if self._in_one_call else ((p, p.rows[None], 1) for p in pieces)
        for piece, rows_KM, count in calls:
            gradient = self.add(
                self._model, params, gradient, prompts, tokens_BT, lengths_B, weights_BT, residuals, rows_KM,
                np.int32(count), slots=piece.slots, answer_slots=piece.answer_slots, chunk=self._chunk,
            )  # fmt: skip
        return gradient


def alike(pieces: Iterable[MicroBatch], batch: int) -> Iterator[tuple[MicroBatch, np.ndarray, int]]:
    """Neighbours of one size and of one width: the first, the rows of all `[K, M]`, and how many they are.

    K is what a whole batch would make, whatever there is: a program compiles once for each width.
    """
    for _, group in itertools.groupby(pieces, key=lambda p: (p.slots, p.answer_slots, len(p.rows))):
        some = list(group)
        rows = np.stack([piece.rows for piece in some])
        nobody = -(-batch // rows.shape[1]) - len(some)
        yield some[0], np.pad(rows, ((0, nobody), (0, 0)), constant_values=batch), len(some)
