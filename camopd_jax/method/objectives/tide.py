"""TIDE: its excess and its deficit, each on the tokens of the step where it is largest (arXiv 2608.09836)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from camopd_jax.errors import UserError
from camopd_jax.method.objectives.top_k import TideDeficit
from camopd_jax.method.tokens import Tokens, largest
from camopd_jax.rollout.score import LOG_PROB
from camopd_jax.types import Record


@dataclass(frozen=True)
class Tide(TideDeficit):
    """`-sg[e_t] log S(y) + lam m_t sum_K T_K log(T_K / S)`.

    The excess `e_t` is that of `excess`, and m_t is 1 on the `deficit_share` of tokens whose deficit
    `sum_K T_K log(T_K / S)` is largest, else 0; K is the teacher's, and only the teacher is renormalised inside it. The
    two choices of tokens are independent, and the mean is over all tokens, with `config.method.normalise = "token"` as
    in the paper.
    """

    excess_share: float = 0.2
    deficit_share: float = 0.2
    lam: float = 1.0
    off_policy: ClassVar[bool] = False
    has_constants: ClassVar[bool] = True
    second_pass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.excess_share, "excess_share")
        check_share(self.deficit_share, "deficit_share")
        if not 0 <= self.lam < math.inf:
            raise UserError(f"lam is {self.lam!r}; give a finite number, at least 0")

    def read_student(self, logits: jax.Array, targets: Record) -> Record:
        return {"deficit": super().loss(logits, targets)}

    def compare(self, tokens: Tokens, state: Record) -> Record:
        lacking_BT = largest(tokens.record["deficit"], tokens.trained, self.deficit_share)
        excess_BT = excess(tokens.log_probs.gap, tokens.trained, self.excess_share)
        return {"excess": excess_BT, "lacking": self.lam * lacking_BT}

    def loss(self, logits: jax.Array, targets: Record) -> jax.Array:
        sampled = -LOG_PROB(logits, targets)["log_prob"]
        return targets["excess"] * sampled + targets["lacking"] * super().loss(logits, targets)


def excess(gap_BT: jax.Array, trained_BT: jax.Array, share: float) -> jax.Array:
    """`2 (e^(a/2) - 1)` on the tokens with a < 0 whose -a is among the largest `share` of all trained ones; else 0."""
    chosen_BT = (gap_BT < 0) & largest(-gap_BT, trained_BT, share)
    return jnp.where(chosen_BT, 2 * jnp.expm1(gap_BT / 2), 0)


def check_share(share: float, name: str = "share") -> None:
    """Raises UserError unless it is a share of the tokens."""
    if not 0 < share <= 1:
        raise UserError(f"{name} is {share!r}; give a share of the tokens, above 0 and at most 1")
