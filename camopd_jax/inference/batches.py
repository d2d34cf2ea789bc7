"""Token lists as batches on a mesh."""

from collections.abc import Sequence

from jax.sharding import Mesh

from camopd_jax.data.pipeline import pad_prompts
from camopd_jax.runtime.buckets import bucket
from camopd_jax.runtime.mesh import global_rows, rows_of_process
from camopd_jax.types import Prompts


def global_batch(mesh: Mesh, ids: Sequence[Sequence[int]], smallest_bucket: int) -> Prompts:
    """Puts token lists, which every process has, on the mesh as one right-padded batch.

    Args:
      ids: the tokens of each row; data x fsdp of the mesh must divide the number of rows.
      smallest_bucket: the width in tokens is this times a power of two.
    """
    width = bucket(max(len(row) for row in ids), smallest_bucket)
    own = pad_prompts([ids[i] for i in rows_of_process(mesh, len(ids))], width)
    return global_rows(mesh, own, len(ids))
