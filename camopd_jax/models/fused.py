"""Fused causal attention over complete rows: a Pallas kernel on TPU, cuDNN on NVIDIA GPUs.

Every device computes its own rows and heads, without communication.
"""

import re
from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from camopd_jax.errors import UserError
from camopd_jax.models.config import AttentionSpec, ModelConfig
from camopd_jax.runtime.mesh import platform
from camopd_jax.runtime.mesh import spec as axes_spec

SHORTEST = 128  # slots; fewer fit one block of the TPU kernel, and plain attention needs little memory for them
_BLOCKS = (512, 256, 128)  # block sizes of the TPU kernel, for queries and keys
_RESIDUAL_BYTES = 2**28  # the TPU kernel stores each log-sum 128 times; this limits the rows computed at a time

Kernel = Callable[..., jax.Array]


def unsupported_reason(config: ModelConfig, mesh: Mesh | None, dtype: str) -> str | None:
    """The reason why no fused kernel supports a model on a mesh; None if one does.

    Args:
      dtype: of the matrix products.

    Returns:
      One clause for an error message, without a full stop.
    """
    target = platform(mesh)
    if config.attention_sinks:
        return "no kernel has the attention sinks of this model"
    if mesh is None or target not in ("tpu", "gpu"):
        return "only TPUs and NVIDIA GPUs have a kernel"
    if dtype not in ("bfloat16", "float16"):
        return f"the kernels multiply bfloat16, not {dtype}; give config.compute.matmul=bfloat16"
    if target == "tpu":
        wide = config.head_dim % 64 == 0
        return None if wide else f"the TPU's kernel needs a head_dim that is a multiple of 64, not {config.head_dim}"
    capability = str(getattr(mesh.devices.flat[0], "compute_capability", ""))
    if re.fullmatch(r"\d+\.\d+", capability) is None or float(capability) < 8:
        return "cuDNN's kernel needs an NVIDIA GPU of compute capability 8.0 or later"
    widest = 256 if float(capability) >= 9 else 128
    if config.head_dim % 8 or config.head_dim > widest:
        return f"cuDNN's kernel needs a head_dim that is a multiple of 8 up to {widest}, not {config.head_dim}"
    if config.attention_softcap is not None:
        return "cuDNN's kernel has no soft cap"
    return None


def attend_rows(
    query: jax.Array, key: jax.Array, value: jax.Array, spec: AttentionSpec, window_index: jax.Array | int = 0
) -> jax.Array:
    """Causal softmax attention of rows `[B, S, H, K]` to themselves; see `attention.attend` for the arguments.

    The mesh's batch axes must divide B, and its tensor axis H and G.
    """
    assert spec.mesh is not None, "a kernel is chosen by the devices of a mesh"
    interpret = spec.mesh.devices.flat[0].platform == "cpu"
    kernel: Kernel = cudnn if platform(spec.mesh) == "gpu" else partial(splash, interpret=interpret)
    # A window of all slots is the same as no window. Each window needs its own kernel.
    windows = tuple(None if w is None or w >= query.shape[1] else w for w in spec.windows)
    distinct = tuple(dict.fromkeys(windows))
    kernels = [partial(kernel, window=w, scale=spec.scale, softcap=spec.softcap) for w in distinct]

    def local(query: jax.Array, key: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
        if len(kernels) == 1:
            return kernels[0](query, key, value)
        return jax.lax.switch(index, kernels, query, key, value)

    index = jnp.asarray([distinct.index(w) for w in windows], jnp.int32)[window_index]
    rows = axes_spec("batch", "sequence", "heads", None)
    cached = axes_spec("batch", "kv_heads", "sequence", None)
    split = jax.shard_map(
        local, mesh=spec.mesh, in_specs=(rows, cached, cached, axes_spec()), out_specs=rows, check_vma=False
    )
    return split(query, key, value, index)


def cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, *, window: int | None, scale: float, softcap: float | None
) -> jax.Array:
    """Attention of one GPU's rows and heads, by cuDNN."""
    assert softcap is None
    return jax.nn.dot_product_attention(
        query,
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of one TPU's rows and heads, by the Pallas kernel of JAX; on a CPU the kernel is interpreted."""
    batch, slots, heads, _ = query.shape
    block, padded = blocks(slots)
    query = (query.astype(jnp.float32) * scale).astype(query.dtype).swapaxes(1, 2)
    # Causal attention ignores the keys of padding slots, because they come after all real queries.
    query, key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, padded - slots), (0, 0))) for x in (query, key, value))
    kernel = _splash_kernel(padded, heads, block, window, softcap, interpret)
    rows = max(1, _RESIDUAL_BYTES // (heads * padded * 128 * 4))
    if rows >= batch:
        out = jax.vmap(kernel)(query, key, value)
    else:
        out = jax.lax.map(lambda row: kernel(*row), (query, key, value), batch_size=rows)
    return out[:, :, :slots].swapaxes(1, 2)


def check(config: ModelConfig, mesh: Mesh | None, dtype: str) -> None:
    """Raises UserError if no fused kernel supports a model."""
    if why := unsupported_reason(config, mesh, dtype):
        raise UserError(f"config.compute.attention is 'fused'; {why}; give auto or xla")


def blocks(slots: int) -> tuple[int, int]:
    """(block size, slots padded to a multiple of it), for the largest block size that adds at most an eighth."""
    sizes = [(block, -(-slots // block) * block) for block in _BLOCKS]
    return next((one for one in sizes if one[1] * 8 <= slots * 9), sizes[-1])


@lru_cache(maxsize=64)
def _splash_kernel(
    slots: int, heads: int, block: int, window: int | None, softcap: float | None, interpret: bool
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    # Slow to import, and only needed here.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (slots, slots)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    sizes = library.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    with jax.ensure_compile_time_eval():
        kernel = library.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)  # host arrays: the program may be compiled for other devices
