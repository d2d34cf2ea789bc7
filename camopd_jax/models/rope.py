"""Rotary position embeddings: their fields in a `config.json`, and their frequencies."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from camopd_jax.errors import UserError
from camopd_jax.models import fields as limits
from camopd_jax.models.family import Family, Fields
from camopd_jax.models.fields import Kind

Scaling = Literal["default", "linear", "llama3", "yarn", "longrope", "proportional", "none"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the angle of pair i at position p is `p * frequency_i`."""

    theta: float
    scaling: Scaling = "default"  # "none": all frequencies are 0, so that nothing is rotated
    factor: float = 1.0
    low_freq_factor: float = 1.0  # this and the next one only for llama3
    high_freq_factor: float = 4.0
    original_context: int = 8192  # for llama3 and yarn
    beta_fast: float = 32.0  # this and the next two only for yarn
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()  # of the pairs, only for longrope
    attention_factor: float = 1.0  # on cosines and sines
    proportion: float = 1.0  # of the pairs that are rotated, only for proportional


NO_ROTATION = Rope(theta=1.0, scaling="none")

_ABOVE_ONE = Kind("a finite number > 1", lambda value: limits.NUMBER.holds(value) and value > 1)
_FACTORS = Kind(
    "a list of finite numbers > 0", lambda value: isinstance(value, list) and all(map(limits.NUMBER.holds, value))
)
# The fields of a RoPE by scaling: those that must be given, and those that may be
_REQUIRED: dict[str, Mapping[str, Kind]] = {
    "default": {},
    "linear": {"factor": limits.NUMBER},
    "dynamic": {"factor": limits.NUMBER},
    "llama3": {
        "factor": limits.NUMBER,
        "high_freq_factor": limits.NUMBER,
        "low_freq_factor": limits.NUMBER,
        "original_max_position_embeddings": limits.COUNT,
    },
    "yarn": {"rope_theta": _ABOVE_ONE},
    "longrope": {"long_factor": _FACTORS, "short_factor": _FACTORS},
    "proportional": {},
}
_OPTIONAL: dict[str, Mapping[str, Kind]] = {
    "yarn": {
        "factor": limits.NUMBER,
        "original_max_position_embeddings": limits.COUNT,
        "attention_factor": limits.NUMBER,
        "beta_fast": limits.NUMBER,
        "beta_slow": limits.NUMBER,
        "mscale": limits.NOT_NEGATIVE,
        "mscale_all_dim": limits.NOT_NEGATIVE,
        "truncate": limits.FLAG,
    },
    "longrope": {
        "factor": limits.NUMBER,
        "original_max_position_embeddings": limits.COUNT,
        "attention_factor": limits.NUMBER,
    },
    "proportional": {"factor": limits.NUMBER, "partial_rotary_factor": limits.FRACTION},
}
_ALIASES = {"su": "longrope"}  # the name in early checkpoints of Phi-3


def blocks(fields: Fields, family: Family) -> dict[str, Fields]:
    """The RoPE fields of each layer type, from `rope_parameters` (transformers 5) or `rope_scaling` (4).

    As in transformers 5, `rope_scaling` precedes `rope_parameters`, and `rope_theta` is for those that have none. In
    families with another RoPE for layers with a window, `rope_parameters` has a block for each type, and `rope_scaling`
    changes that of the other layers.
    """
    scaling, given, full = fields.get("rope_scaling") or {}, fields.get("rope_parameters"), "full_attention"
    given = family.defaults.get("rope_parameters") or {} if given is None else given
    theta = {"rope_theta": fields["rope_theta"]}
    if not family.local_rope_field:
        return dict.fromkeys((full, "sliding_attention"), theta | (scaling or given))
    thetas = {full: theta, "sliding_attention": {"rope_theta": fields[family.local_rope_field]}}
    given = given or {layer_type: {} for layer_type in thetas}
    changed = given | {full: (given.get(full) or {}) | scaling}
    of_types = {t: thetas[t] | changed[t] for t in thetas if isinstance(given.get(t), dict)}
    # transformers does not read `truncate` there
    return {t: {name: value for name, value in b.items() if name != "truncate"} for t, b in of_types.items()}


def rotary_dim(block: Fields, fields: Fields, family: Family, head_dim: int, where: str) -> int:
    """How many numbers of a head are rotated. A RoPE's own `partial_rotary_factor` precedes that of the model.

    Raises:
      UserError: if the number is odd.
    """
    name = "partial_rotary_factor"
    if name not in family.rope_fields or family.global_attention:  # there, the scaling "proportional" reads it
        return head_dim
    partial = block.get(name, fields[name])
    limits.FRACTION.check(partial, name, where)
    dim = int(head_dim * partial)
    if dim == 0 or dim % 2:
        raise UserError(
            f"{where}: {name} is {partial}, which rotates {dim} of head_dim = {head_dim}; RoPE needs an even number > 0"
        )
    return dim


def query_growth(block: Fields, fields: Fields, family: Family, where: str) -> tuple[float, int] | None:
    """`ModelConfig.query_growth`, of families whose RoPE has `llama_4_scaling_beta`."""
    name = "llama_4_scaling_beta"
    if name not in family.rope_fields:
        return None
    limits.NOT_NEGATIVE.check(block.get(name), name, where)
    return float(block[name]), int(block.get("original_max_position_embeddings") or fields["max_position_embeddings"])


def read(block: Fields, fields: Fields, family: Family, rotary: int, context: int | None, where: str) -> Rope:
    """A RoPE from its fields.

    Args:
      block: the fields of the RoPE.
      fields: of the config.json.
      rotary: how many numbers of a head are rotated.
      context: as in `config.from_hf`.

    Raises:
      UserError: for a scaling or field that is not supported.
    """
    scaling = _checked(block, family, where)
    max_positions, theta = fields["max_position_embeddings"], float(block["rope_theta"])
    # Phi-3's own field has precedence over that of the RoPE.
    original = fields.get("original_max_position_embeddings") or block.get("original_max_position_embeddings")
    original = int(original or max_positions)
    if scaling == "linear":
        return Rope(theta, "linear", float(block["factor"]))
    if scaling == "proportional":
        proportion = float(block.get("partial_rotary_factor", 1.0))
        return Rope(theta, "proportional", float(block.get("factor") or 1.0), proportion=proportion)
    if scaling == "dynamic":
        # NTK-aware scaling ("dynamic" in transformers), for the fixed length `context`.
        stretch = max(context or 0, max_positions) / max_positions
        growth = float(block["factor"]) * stretch - (float(block["factor"]) - 1)
        return Rope(theta * growth ** (rotary / (rotary - 2)))
    if scaling == "llama3":
        low, high = block["low_freq_factor"], block["high_freq_factor"]
        if low >= high:
            raise UserError(f"{where}: field low_freq_factor is {low}; give a number < high_freq_factor = {high}")
        return Rope(theta, "llama3", float(block["factor"]), float(low), float(high), original)
    factor = float(block.get("factor") or max_positions / original)
    if scaling == "yarn":
        return Rope(
            theta,
            "yarn",
            factor,
            original_context=original,
            beta_fast=float(block.get("beta_fast") or 32.0),
            beta_slow=float(block.get("beta_slow") or 1.0),
            truncate=block.get("truncate", True),
            attention_factor=_yarn_attention_factor(block, factor),
        )
    if scaling == "longrope":
        name = "long_factor" if (context or 0) > original else "short_factor"
        if len(block[name]) != rotary // 2:
            raise UserError(f"{where}: RoPE field {name} has {len(block[name])} numbers; give {rotary // 2}")
        return Rope(
            theta,
            "longrope",
            factors=tuple(map(float, block[name])),
            attention_factor=_longrope_attention_factor(block, factor, original, where),
        )
    return Rope(theta)


def _checked(block: Fields, family: Family, where: str) -> str:
    """Checks the fields of a RoPE; returns its scaling."""
    scaling = block.get("rope_type", block.get("type", "default"))
    scaling = _ALIASES.get(scaling, scaling) if isinstance(scaling, str) else scaling
    supported = [name for name in _REQUIRED if name != "proportional" or family.global_attention]
    if not isinstance(scaling, str) or scaling not in supported:
        raise UserError(f"{where}: RoPE scaling {scaling!r} is not supported; supported are {', '.join(supported)}")
    limits.NUMBER.check(block.get("rope_theta"), "rope_theta", where)
    required, optional = _REQUIRED[scaling], _OPTIONAL.get(scaling, {})
    for name, value in block.items():
        known = {"rope_type", "type", "rope_theta", *required, *optional, *family.rope_fields}
        if name not in known and value not in (None, 1.0):
            raise UserError(f"{where}: RoPE field {name} = {value!r} is not supported for scaling {scaling!r}")
    for name, kind in required.items():
        if block.get(name) is None:
            raise UserError(f"{where}: RoPE scaling {scaling!r} needs the field {name}")
        kind.check(block[name], name, where)
    for name, kind in optional.items():
        if block.get(name) is not None:
            kind.check(block[name], name, where)
    return scaling


def _yarn_attention_factor(block: Fields, factor: float) -> float:
    """https://arxiv.org/abs/2309.00071, Eq 22; `mscale` and `mscale_all_dim` are those of DeepSeek-V2."""

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if block.get("attention_factor") is not None:
        return float(block["attention_factor"])
    if block.get("mscale") and block.get("mscale_all_dim"):
        return growth(block["mscale"]) / growth(block["mscale_all_dim"])
    return growth(1.0)


def _longrope_attention_factor(block: Fields, factor: float, original: int, where: str) -> float:
    """https://arxiv.org/abs/2402.13753, section 3.3."""
    if block.get("attention_factor") is not None:
        return float(block["attention_factor"])
    if factor <= 1:
        return 1.0
    _ABOVE_ONE.check(original, "original_max_position_embeddings", where)
    return math.sqrt(1 + math.log(factor) / math.log(original))


def frequencies(rope: Rope, dim: int) -> np.ndarray:
    """Radians per position of each pair, float[dim / 2], as transformers computes them.

    Args:
      dim: how many numbers of a head are rotated.
    """
    plain = 1.0 / rope.theta ** (np.arange(0, dim, 2) / dim)
    if rope.scaling == "none":
        return np.zeros_like(plain)
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "proportional":
        return np.where(np.arange(dim // 2) < int(rope.proportion * dim // 2), plain / rope.factor, 0.0)
    if rope.scaling == "longrope":
        return plain / np.asarray(rope.factors)
    if rope.scaling == "llama3":
        turns = rope.original_context * plain / (2 * np.pi)  # in the original context
        unstretched = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return _between(plain, rope.factor, np.clip(unstretched, 0.0, 1.0))
    if rope.scaling == "yarn":
        return _between(plain, rope.factor, 1 - _yarn_ramp(rope, dim))
    return plain


def _between(plain: np.ndarray, factor: float, unstretched: np.ndarray) -> np.ndarray:
    """Frequencies between `plain / factor` (`unstretched` is 0) and `plain` (1)."""
    return plain * unstretched + plain / factor * (1 - unstretched)


def _yarn_ramp(rope: Rope, dim: int) -> np.ndarray:
    """How far each pair is stretched: 0 for those that turn more than `beta_fast` times in the original context, 1 for
    those that turn less than `beta_slow` times. https://arxiv.org/abs/2309.00071, Eq 18, linear in the pair's index.
    """

    def pair(turns: float) -> float:
        """The index of the pair that turns so many times."""
        return dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    return np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
