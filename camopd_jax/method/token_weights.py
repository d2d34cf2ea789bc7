"""Constant weights of single tokens, which a branch combines with its objective: `config.branches.NAME.weights`.

Each class computes the next weight of every token from the last one. The first weight is the objective's coefficient,
for `sampled_token` the advantage `a = log teacher - log student`. A new one needs a class here and a line of `WEIGHTS`.

Shares of tokens are of all tokens that a step trains: those of the branch's selected answers.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from camopd_jax.config.schema import TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.method.named import named
from camopd_jax.method.objectives import Objective
from camopd_jax.method.objectives.tide import check_share, excess
from camopd_jax.method.tokens import Tokens as Tokens
from camopd_jax.method.tokens import largest
from camopd_jax.rollout.sampling import entropy
from camopd_jax.types import Record


@dataclass(frozen=True)
class TokenWeight:
    """The fields are the weight's options. Hashable: a static argument of compiled functions."""

    # Whether it changes the advantage, so that it needs an objective that has one and no other weight before it
    of_advantage: ClassVar[bool] = False

    def read(self, logits: jax.Array, targets: Record) -> Record:
        """The teacher's values that it needs; as `Objective.read`."""
        return {}

    def apply(self, weight_BT: jax.Array, tokens: Tokens) -> jax.Array:
        """The next weight, float32[B, T]; padding and unselected answers are ignored."""
        raise NotImplementedError


# ---------------------------------------------------------------------------------- the advantage


@dataclass(frozen=True)
class TopD(TokenWeight):
    """The advantage toward a mixture of both models, `log(alpha T / S + 1 - alpha)`; at least `log(1 - alpha)`."""

    of_advantage: ClassVar[bool] = True
    alpha: float = 0.5

    def __post_init__(self) -> None:
        _check_between(self.alpha, "alpha")

    def apply(self, weight_BT: jax.Array, tokens: Tokens) -> jax.Array:
        return jnp.logaddexp(jnp.log(self.alpha) + weight_BT, jnp.log1p(-self.alpha))


@dataclass(frozen=True)
class Reopold(TokenWeight):
    """The advantage, at least `log(lam / (1 - lam))` (Relaxed OPD, arXiv 2603.11137)."""

    of_advantage: ClassVar[bool] = True
    lam: float = 0.17

    def __post_init__(self) -> None:
        _check_between(self.lam, "lam", high=0.5)  # beyond, the floor is positive

    def apply(self, weight_BT: jax.Array, tokens: Tokens) -> jax.Array:
        return jnp.maximum(weight_BT, jnp.log(self.lam) - jnp.log1p(-self.lam))


@dataclass(frozen=True)
class TideExcess(TokenWeight):
    """`2 (e^(a/2) - 1)` on the tokens with a < 0 whose -a is among the largest `share` of all; 0 on the others.

    Before the choice of tokens, it is the gradient of four times the squared Hellinger distance (arXiv 2608.09836).
    """

    of_advantage: ClassVar[bool] = True
    share: float = 0.2

    def __post_init__(self) -> None:
        check_share(self.share)

    def apply(self, weight_BT: jax.Array, tokens: Tokens) -> jax.Array:
        return excess(weight_BT, tokens.trained, self.share)


@dataclass(frozen=True)
class Overlong(TokenWeight):
    """Adds DAPO's penalty of long answers to the advantage: 0, then down to -1 in the last `buffer` of `limit` tokens.

    `min(0, max(-1, (limit - buffer - length) / buffer))` (arXiv 2503.14476)
    """

    of_advantage: ClassVar[bool] = True
    limit: int = 20480
    buffer: int = 4096

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.limit:
            raise UserError(f"buffer is {self.buffer!r}; give a number of tokens between 1 and limit = {self.limit!r}")

    def apply(self, weight_BT: jax.Array, tokens: Tokens) -> jax.Array:
        penalty_B = jnp.clip((self.limit - self.buffer - tokens.lengths) / self.buffer, -1, 0)
        return weight_BT + penalty_B[:, None]


@dataclass(frozen=True)
class Unlikely(TokenWeight):
    """A control without a teacher: this advantage on the `share` of tokens least likely for the student, else 0."""

    of_advantage: ClassVar[bool] = True
    share: float = 0.2
    advantage: float = -0.5

    def __post_init__(self) -> None:
        check_share(self.share)
        if not -math.inf < self.advantage < 0:
            raise UserError(f"advantage is {self.advantage!r}; give a finite number below 0")

    def apply(self, weight_BT: jax.Array, tokens: Tokens) -> jax.Array:
        unlikely_BT = largest(-tokens.log_probs.student, tokens.trained, self.share)
        return jnp.where(unlikely_BT, self.advantage, 0.0)


# ------------------------------------------------------------------------------ factors and masks


@dataclass(frozen=True)
class IwOpd(TokenWeight):
    """A factor that falls along the answer with the gap so far (IW-OPD).

    `1 + gamma (1 - sum_{s<t} |a_s| / sum_s |a_s|)`
    """

    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise UserError(f"gamma is {self.gamma!r}; give a finite number, at least 0")

    def apply(self, weight_BT: jax.Array, tokens: Tokens) -> jax.Array:
        size_BT = jnp.where(tokens.trained, jnp.abs(tokens.log_probs.gap), 0)
        through_BT = jnp.cumsum(size_BT, axis=1)
        total_B1 = through_BT[:, -1:]
        before_BT = jnp.where(total_B1 > 0, (through_BT - size_BT) / jnp.where(total_B1 > 0, total_B1, 1), 0)
        return weight_BT * (1 + self.gamma * (1 - before_BT))


@dataclass(frozen=True)
class UcMopd(TokenWeight):
    """Keeps each token at random, by how likely it is for the teacher (UC-MOPD, arXiv 2608.26735).

    With H the teacher's entropy, `s = min(T(y) e^H, 1)`. A token with a > 0 is kept with probability s, with a < 0 with
    probability 1 - s, and with a = 0 never.
    """

    def read(self, logits: jax.Array, targets: Record) -> Record:
        return {"entropy": entropy(jax.nn.log_softmax(logits, axis=-1))}

    def probability(self, tokens: Tokens) -> jax.Array:
        """The probability to keep each token, float32[B, T]."""
        likely_BT = jnp.exp(jnp.minimum(tokens.log_probs.teacher + tokens.record["entropy"], 0))
        gap_BT = tokens.log_probs.gap
        return jnp.where(gap_BT > 0, likely_BT, jnp.where(gap_BT < 0, 1 - likely_BT, 0))

    def apply(self, weight_BT: jax.Array, tokens: Tokens) -> jax.Array:
        slots = weight_BT.shape[1]
        uniform_BT = jax.vmap(lambda key: jax.random.uniform(key, (slots,)))(tokens.keys)
        return jnp.where(uniform_BT < self.probability(tokens), weight_BT, 0)


@dataclass(frozen=True)
class Hardest(TokenWeight):
    """Keeps the `share` of tokens with the largest |gap|, after AdaKD's filter (arXiv 2510.11615).

    The weights of the others move to them, so that a mean over all tokens becomes one over the kept ones. The objective
    `adakd` measures difficulty by the Hellinger distance and adapts the share to the loss; here it is fixed.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        check_share(self.share)

    def apply(self, weight_BT: jax.Array, tokens: Tokens) -> jax.Array:
        kept_BT = largest(jnp.abs(tokens.log_probs.gap), tokens.trained, self.share)
        factor = jnp.sum(tokens.trained) / jnp.maximum(jnp.sum(kept_BT), 1)
        return jnp.where(kept_BT, weight_BT * factor, 0)


@dataclass(frozen=True)
class Exclude(TokenWeight):
    """Excludes tokens by id: those of a chat template, on which the models differ for no good reason.

    Revisiting OPD (arXiv 2603.25562) excludes special tokens but not the one that ends an answer.
    """

    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ids = self.tokens
        if not isinstance(ids, list | tuple) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise UserError(f"tokens is {ids!r}; give token ids, as in exclude(tokens=(151667, 151668))")
        object.__setattr__(self, "tokens", tuple(ids))  # hashable

    def apply(self, weight_BT: jax.Array, tokens: Tokens) -> jax.Array:
        return jnp.where(jnp.isin(tokens.ids, jnp.array(self.tokens)), 0, weight_BT)


WEIGHTS: dict[str, type[TokenWeight]] = {
    "top_d": TopD,
    "reopold": Reopold,
    "tide_excess": TideExcess,
    "overlong": Overlong,
    "unlikely": Unlikely,
    "iw_opd": IwOpd,
    "uc_mopd": UcMopd,
    "hardest": Hardest,
    "exclude": Exclude,
}


def branch_weights(config: TrainConfig, branch: str, objective: Objective) -> tuple[TokenWeight, ...]:
    """The weights that a branch's config names, in its order.

    Raises:
      UserError: naming the field, for unknown names and options, and for a weight of the advantage that does not come
        first or whose objective has none.
    """
    weights: list[TokenWeight] = []
    for i, text in enumerate(config.branches[branch].weights):
        field = f"config.branches.{branch}.weights[{i}]"
        weight = named(text, field, WEIGHTS, "weights", "top_d(alpha=0.5)")
        if weight.of_advantage and not objective.has_advantage:
            chosen = config.branches[branch].objective
            raise UserError(
                f"{field} is {text!r}, which changes the advantage, but {chosen} has none; give sampled_token"
            )
        if weight.of_advantage and weights and not weights[-1].of_advantage:
            raise UserError(f"{field} is {text!r}, which changes the advantage; give it before the other weights")
        weights.append(weight)
    return tuple(weights)


def _check_between(value: float, name: str, high: float = 1) -> None:
    if not 0 < value < high:
        raise UserError(f"{name} is {value!r}; give a number between 0 and {high:g}")
