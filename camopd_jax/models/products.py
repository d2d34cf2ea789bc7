"""Matrix products, as the layers and the head compute them."""

from functools import partial

import jax
import jax.numpy as jnp

_Operands = tuple[jax.Array, jax.Array]  # the operands of a product, or their gradients


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """The precision of products of arrays of this dtype.

    Float32 is multiplied as float32 on every platform. JAX's default rounds it to TF32 on GPUs and to bfloat16 on TPUs.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def einsum(equation: str, x: jax.Array, y: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, with its `precision`.

    Args:
      dtype: of the result; None: that of the operands.
    """
    return jnp.einsum(equation, x, y, precision=precision(x.dtype), preferred_element_type=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`einsum(equation, x, kernel)`, with `x` as the left operand of the product for the kernel's gradient.

    XLA fuses the transpose of a left operand with the operations that compute it. JAX's own order has the gradient of
    an activation there, which takes longer than the product: on 2 CPU cores, an update would take a fifth longer.
    """
    return einsum(equation, x, kernel)


def _multiply_forward(equation: str, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, _Operands]:
    return einsum(equation, x, kernel), (x, kernel)


def _multiply_backward(equation: str, saved: _Operands, gradient: jax.Array) -> _Operands:
    x, kernel = saved
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    to_x = einsum(f"{output},{right}->{left}", gradient, kernel)
    return to_x, einsum(f"{left},{output}->{right}", x, gradient)


multiply.defvjp(_multiply_forward, _multiply_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply_to_float32(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`einsum(equation, x, kernel)` in float32, whose gradient is first rounded to the dtype of the operands.

    JAX would widen bfloat16 operands to float32 for both products of the backward pass, which then take twice as long.
    """
    return einsum(equation, x, kernel, jnp.float32)


def _float32_forward(equation: str, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, _Operands]:
    return einsum(equation, x, kernel, jnp.float32), (x, kernel)


def _float32_backward(equation: str, saved: _Operands, gradient: jax.Array) -> _Operands:
    x, kernel = saved
    _, pull = jax.vjp(partial(einsum, equation), x, kernel)
    to_x, to_kernel = pull(gradient.astype(x.dtype))
    return to_x, to_kernel


multiply_to_float32.defvjp(_float32_forward, _float32_backward)
