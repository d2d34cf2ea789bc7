"""Log-probabilities of a batch, a few rows of like length at a time: the host's loop over `rollout.score`.

What is computed at one time is `size` rows, whatever the batch; and of those only as many slots as the longest needs.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from camopd_jax.rollout import score as steps
from camopd_jax.rollout.buckets import MicroBatch, split_by_length
from camopd_jax.runtime import heap
from camopd_jax.runtime.mesh import batch_shards, gather, platform, sharding
from camopd_jax.types import LanguageModel, Params, Prompts

WIDTHS = ("slots", "answer_slots", "chunk")


@functools.cache
def scoring(mesh: Mesh | None) -> Any:
    """`rollout.score.score_rows`, compiled."""
    rows = None if mesh is None else sharding(mesh, "batch")
    return jax.jit(
        steps.score_rows,
        static_argnums=0,
        static_argnames=(*WIDTHS, "temperature", "with_top"),
        donate_argnums=2,
        out_shardings=rows,
    )


def score(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    pieces: Iterable[MicroBatch],
    *,
    with_top: bool = False,
    **options: Any,
) -> jax.Array:
    """`rollout.score.score` of the rows in these pieces; the others' are 0. `options`: `chunk`, `temperature`."""
    give_back(model.mesh)
    program = scoring(model.mesh)
    shape = (*tokens_BT.shape, 2) if with_top else tokens_BT.shape
    scored = jnp.zeros(shape, jnp.float32, device=None if model.mesh is None else sharding(model.mesh, "batch"))
    for piece in pieces:
        widths = {"slots": piece.slots, "answer_slots": piece.answer_slots}
        scored = program(
            model, params, scored, prompts, tokens_BT, lengths_B, piece.rows, with_top=with_top, **widths, **options
        )
    return scored


def give_back(mesh: Mesh | None) -> None:
    """What is free of the host's heap, where arrays lie in the host's memory."""
    if platform(mesh) == "cpu":
        heap.trim()


def micro_batches(
    mesh: Mesh | None,
    prompts: Prompts,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    size: int,
    smallest: int,
    rows: np.ndarray | None = None,
) -> Iterator[MicroBatch]:
    """`buckets.pieces` of a batch on the mesh: of these rows, or of all. Every process has to ask."""
    prompt_lengths, lengths = gather((prompts.lengths, lengths_B))
    rows = np.arange(len(lengths)) if rows is None else rows
    widths = prompts.tokens.shape[1], tokens_BT.shape[1]
    return split_by_length(prompt_lengths, lengths, rows, size, widths, smallest, batch_shards(mesh))
