"""The mean hidden state of a prompt, by which prompts are clustered."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from camopd_jax.inference.batches import global_batch
from camopd_jax.inference.loading import Loaded
from camopd_jax.rollout.masks import length_mask
from camopd_jax.runtime.buckets import length_batches
from camopd_jax.runtime.mesh import gather
from camopd_jax.types import LanguageModel, Params, Prompts


def prompt_features(
    loaded: Loaded, prompts: Sequence[Sequence[int]], *, batch_size: int, smallest_bucket: int = 64
) -> np.ndarray:
    """float32[N, D]: the final hidden state of each prompt, mean over its tokens.

    Args:
      prompts: token ids of each prompt.
      batch_size: prompts read at a time; data x fsdp of the mesh must divide it.
      smallest_bucket: batches are padded to this times a power of two.
    """
    results: dict[int, np.ndarray] = {}
    for rows in length_batches([len(prompt) for prompt in prompts], batch_size):
        batch = global_batch(loaded.mesh, [prompts[i] for i in rows], smallest_bucket)
        means = gather(_mean_states(loaded.model, loaded.params, batch))
        results |= {int(row): mean for row, mean in zip(rows, means, strict=True)}
    return np.stack([results[i] for i in range(len(prompts))])


@functools.partial(jax.jit, static_argnums=0)
def _mean_states(model: LanguageModel, params: Params, prompts: Prompts) -> jax.Array:
    """float32[B, D]"""
    hidden_BPD = model.hidden(params, prompts.tokens).astype(jnp.float32)
    mask_BP = length_mask(prompts.lengths, prompts.tokens.shape[1])
    total_BD = jnp.sum(jnp.where(mask_BP[..., None], hidden_BPD, 0), axis=1)
    return total_BD / prompts.lengths[:, None]
