"""Scores and gradients of a batch, a few rows of like length at a time: the host's loops over compiled parts.

What is computed at one time is `size` rows, whatever the batch; and of those only as many slots as the longest needs.
On a CPU both begin by giving back what earlier parts of the step have freed: they take the most memory of it.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from camopd_jax import freed
from camopd_jax.buckets import Piece, pieces
from camopd_jax.sharding import batch_shards, platform, sharding, whole
from camopd_jax.steps import score as steps
from camopd_jax.steps.update import Gradient, add_gradient, no_gradient
from camopd_jax.types import LanguageModel, Params, Prompts, Residuals

_WIDTHS = ("slots", "answer_slots", "chunk")


@functools.cache
def scoring(mesh: Mesh | None) -> Any:
    """`steps.score.score_rows`, compiled."""
    rows = None if mesh is None else sharding(mesh, "batch")
    return jax.jit(
        steps.score_rows,
        static_argnums=0,
        static_argnames=(*_WIDTHS, "temperature", "with_top"),
        donate_argnums=2,
        out_shardings=rows,
    )


def score(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    pieces: Iterable[Piece],
    *,
    with_top: bool = False,
    **options: Any,
) -> jax.Array:
    """`steps.score.score` of the rows in these pieces; the others' are 0. `options`: `chunk`, `temperature`."""
    _give_back(model.mesh)
    program = scoring(model.mesh)
    shape = (*tokens_BT.shape, 2) if with_top else tokens_BT.shape
    scored = jnp.zeros(shape, jnp.float32, device=None if model.mesh is None else sharding(model.mesh, "batch"))
    for piece in pieces:
        widths = {"slots": piece.slots, "answer_slots": piece.answer_slots}
        scored = program(
            model, params, scored, prompts, tokens_BT, lengths_B, piece.rows, with_top=with_top, **widths, **options
        )
    return scored


def _give_back(mesh: Mesh | None) -> None:
    """What is free of the host's heap, where arrays lie in the host's memory."""
    if platform(mesh) == "cpu":
        freed.return_the_rest()


def micro_batches(
    mesh: Mesh | None,
    prompts: Prompts,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    size: int,
    smallest: int,
    rows: np.ndarray | None = None,
) -> Iterator[Piece]:
    """`buckets.pieces` of a batch on the mesh: of these rows, or of all. Every process has to ask."""
    prompt_lengths, lengths = whole((prompts.lengths, lengths_B))
    rows = np.arange(len(lengths)) if rows is None else rows
    widths = prompts.tokens.shape[1], tokens_BT.shape[1]
    return pieces(prompt_lengths, lengths, rows, size, widths, smallest, batch_shards(mesh))


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
            add_gradient, static_argnums=0, static_argnames=_WIDTHS, donate_argnums=2, out_shardings=whole
        )

    def __call__(
        self,
        params: Params,
        prompts: Prompts,
        tokens_BT: jax.Array,
        lengths_B: jax.Array,
        weights_BT: jax.Array,
        pieces: Iterable[Piece],
        residuals: Residuals = (),
    ) -> Gradient:
        """`steps.update.add_gradient` over all pieces."""
        _give_back(self._model.mesh)
        gradient = self.begin(params)
        calls = alike(pieces, len(lengths_B)) if self._in_one_call else ((p, p.rows[None], 1) for p in pieces)
        for piece, rows_KM, count in calls:
            gradient = self.add(
                self._model, params, gradient, prompts, tokens_BT, lengths_B, weights_BT, residuals, rows_KM,
                np.int32(count), slots=piece.slots, answer_slots=piece.answer_slots, chunk=self._chunk,
            )  # fmt: skip
        return gradient


def alike(pieces: Iterable[Piece], batch: int) -> Iterator[tuple[Piece, np.ndarray, int]]:
    """Neighbours of one size and of one width: the first, the rows of all `[K, M]`, and how many they are.

    K is what a whole batch would make, whatever there is: a program compiles once for each width.
    """
    for _, group in itertools.groupby(pieces, key=lambda p: (p.slots, p.answer_slots, len(p.rows))):
        some = list(group)
        rows = np.stack([piece.rows for piece in some])
        nobody = -(-batch // rows.shape[1]) - len(some)
        yield some[0], np.pad(rows, ((0, nobody), (0, 0)), constant_values=batch), len(some)
