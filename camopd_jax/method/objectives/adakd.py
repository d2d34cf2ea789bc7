"""AdaKD: reverse KL on the most difficult tokens, each at its own temperature (arXiv 2510.11615)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from camopd_jax.errors import UserError
from camopd_jax.method.objectives.base import Objective
from camopd_jax.method.objectives.full_vocabulary import kl
from camopd_jax.method.objectives.tide import check_share
from camopd_jax.method.tokens import Tokens, nth_largest
from camopd_jax.types import Record


@dataclass(frozen=True)
class AdaKD(Objective):
    """`tau_t^2 KL(S_tau || T_tau)`: the mean over the share r of the step's tokens with the largest difficulty d_t.

    d_t is the squared Hellinger distance `1 - sum_v sqrt(S T)`, or with `squared=False` its root, as in the authors'
    code. `tau_t = exp(-c tanh(log(d_t / median)))`, with the median of the kept tokens, divides the logits of both
    models. r begins at 1. When the moving average of the loss has risen by more than `epsilon` times its value at the
    last change, r is multiplied by 1 + sigma, up to 1; when it has fallen by more, by 1 - sigma, down to `least`.
    """

    c: float = 0.5
    sigma: float = 0.05
    epsilon: float = 0.05
    decay: float = 0.99
    least: float = 0.1
    squared: bool = True
    teacher_logits: ClassVar[bool] = True
    has_constants: ClassVar[bool] = True
    second_pass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.c < math.inf:
            raise UserError(f"c is {self.c!r}; give a finite number, at least 0")
        for name in ("sigma", "epsilon", "decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)!r}; give a number from 0 to below 1")
        check_share(self.least, "least")
        if not isinstance(self.squared, bool):
            raise UserError(f"squared is {self.squared!r}; give True or False")

    def read_student(self, logits: jax.Array, targets: Record) -> Record:
        roots = [jnp.exp(jax.nn.log_softmax(z, axis=-1) / 2) for z in (logits, targets["teacher_logits"])]
        distance = jnp.sum(jnp.square(roots[0] - roots[1]), axis=-1) / 2  # `1 - sum` would round to 0
        return {"difficulty": distance if self.squared else jnp.sqrt(distance)}

    def initial_state(self) -> Record:
        """The share r; the moving average of the loss, and its value at the last change, 0 before the first loss."""
        return {"token_share": jnp.float32(1), "loss_average": jnp.float32(0), "loss_reference": jnp.float32(0)}

    def compare(self, tokens: Tokens, state: Record) -> Record:
        difficulty_BT, number = tokens.record["difficulty"], jnp.sum(tokens.trained)
        count = jnp.maximum(jnp.floor(state["token_share"] * number + 1e-3), 1).astype(jnp.int32)
        kept_BT = tokens.trained & (difficulty_BT >= nth_largest(difficulty_BT, tokens.trained, count - 1))
        median = nth_largest(difficulty_BT, tokens.trained, count // 2)  # of the two in the middle, the smaller one
        relative_BT = jnp.where(kept_BT & (median > 0), difficulty_BT / jnp.where(median > 0, median, 1), 1)
        log_temperature_BT = -self.c * jnp.tanh(jnp.log(jnp.maximum(relative_BT, 1e-8)))
        factor = number / jnp.maximum(jnp.sum(kept_BT), 1)  # of the mean over all tokens
        return {"log_temperature": log_temperature_BT, "kept": jnp.where(kept_BT, factor, 0)}

    def loss(self, logits: jax.Array, targets: Record) -> jax.Array:
        temperature = jnp.exp(targets["log_temperature"])
        student = jax.nn.log_softmax(logits / temperature[..., None], axis=-1)
        teacher_logits = jax.lax.stop_gradient(targets["teacher_logits"])
        teacher = jax.nn.log_softmax(teacher_logits / temperature[..., None], axis=-1)
        return targets["kept"] * jnp.square(temperature) * kl(student, teacher)

    def next_state(self, state: Record, loss: jax.Array) -> Record:
        share, average, reference = state["token_share"], state["loss_average"], state["loss_reference"]
        average = jnp.where(average > 0, self.decay * average + (1 - self.decay) * loss, loss)
        reference = jnp.where(reference > 0, reference, average)
        rises = average > (1 + self.epsilon) * reference
        falls = average < (1 - self.epsilon) * reference
        factor = jnp.where(rises, 1 + self.sigma, jnp.where(falls, 1 - self.sigma, 1.0))
        share = jnp.clip(share * factor, self.least, 1)
        return {
            "token_share": share,
            "loss_average": average,
            "loss_reference": jnp.where(rises | falls, average, reference),
        }
