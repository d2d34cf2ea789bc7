"""The properties of a decoder-only transformer, read from a Hugging Face `config.json`.

The layers depend only on these properties, never on the name of a model family.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from jax.sharding import Mesh

from camopd_jax.errors import UserError
from camopd_jax.models import fields as limits
from camopd_jax.models.families import FAMILIES, Family, Fields, QKNorm

Activation = Literal["silu", "gelu_tanh"]
Implementation = Literal["auto", "xla", "fused"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the angle of pair i at position p is `p * frequency_i`."""

    theta: float
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # this and the next two only for llama3
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and properties of one transformer. Hashable: a static argument of compiled functions."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tied_head: bool
    activation: Activation
    ropes: tuple[Rope, ...]
    layer_rope: tuple[int, ...]  # for each layer, an index in `ropes`
    windows: tuple[int | None, ...]  # for each layer, the attention window in positions, the token's own included
    query_scale: float  # factor on q.k
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: QKNorm | None = None
    pre_norms: bool = True  # whether norms precede attention and feed-forward
    post_norms: bool = False  # whether norms follow attention and feed-forward
    norm_offset: float = 0.0  # added to a norm's weight
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and feed-forward add to the residual stream
    logits_divisor: float = 1.0  # before the final soft cap
    attention_softcap: float | None = None
    final_softcap: float | None = None
    initializer_range: float = 0.02
    output_vocab_size: int | None = None  # logits are cut to this; None: vocab_size
    module_names: tuple[tuple[str, str], ...] = ()  # Hugging Face names that differ from `weights.MODULE_NAMES`
    adapter: tuple[tuple[str, int], ...] = ()  # modules with an adapter (`models.adapters`), and its largest rank

    @property
    def distinct_windows(self) -> tuple[int | None, ...]:
        """The different `windows`, each once."""
        return tuple(dict.fromkeys(self.windows))

    @property
    def layer_window(self) -> tuple[int, ...]:
        """For each layer, an index in `distinct_windows`."""
        return tuple(self.distinct_windows.index(window) for window in self.windows)


@dataclass(frozen=True)
class AttentionSpec:
    """The settings of attention that all layers of a model share."""

    windows: tuple[int | None, ...]  # the different windows of the layers; None: no window
    scale: float  # factor on q.k, before `softcap * tanh(scores / softcap)`
    softcap: float | None = None
    # For complete rows. "fused": the platform's kernel; "auto": the kernel if rows are long enough and divide over the
    # mesh; "xla": plain matrix products. Attention over a cache is always plain.
    implementation: Implementation = "xla"
    mesh: Mesh | None = None  # rows and heads are split over it; None: one device


_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters"}


def from_hf(config: Fields, *, context: int | None = None, where: str = "config.json") -> ModelConfig:
    """Reads a config.json of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Args:
      context: the longest sequence of the run in tokens. Only "dynamic" RoPE scaling depends on it: the scaling is
        computed once for this length, so that a row's result does not depend on the other rows.
      where: the file's name in error messages.

    Raises:
      UserError: for an unknown architecture, and for an unknown field that may change the output.
    """
    fields, family = _checked_fields(config, where)
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_dim = fields["head_dim"] or width // heads
    activation = fields[family.activation_field]
    if activation not in _ACTIVATIONS:
        raise UserError(f"{where}: activation {activation!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    types = _layer_types(fields, family, where)
    rope_of_type = _ropes(config, fields, family, head_dim, context, where)
    if lacking := set(types) - rope_of_type.keys():
        raise UserError(f"{where}: rope_parameters has no block for layers of type {min(lacking)}; add it")
    ropes = tuple(dict.fromkeys(rope_of_type.values()))
    bias = fields["attention_bias"]
    return ModelConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=width,
        intermediate_size=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=fields["num_key_value_heads"] or heads,
        head_dim=head_dim,
        norm_eps=fields["rms_norm_eps"],
        tied_head=fields["tie_word_embeddings"],
        activation=_ACTIVATIONS[activation],
        ropes=ropes,
        layer_rope=tuple(ropes.index(rope_of_type[t]) for t in types),
        windows=tuple(fields["sliding_window"] if t == "sliding_attention" else None for t in types),
        query_scale=fields.get("attention_multiplier", fields.get("query_pre_attn_scalar", head_dim) ** -0.5),
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=bias if family.output_bias is None else family.output_bias,
        mlp_bias=fields["mlp_bias"],
        qk_norm=family.qk_norm,
        pre_norms=family.pre_norms,
        post_norms=family.post_norms,
        norm_offset=family.norm_offset,
        embed_scale=width**0.5 if family.scales_embedding else fields.get("embedding_multiplier", 1.0),
        residual_scale=fields.get("residual_multiplier", 1.0),
        logits_divisor=fields.get("logits_scaling", 1.0),
        attention_softcap=fields.get("attn_logit_softcapping"),
        final_softcap=fields.get("final_logit_softcapping"),
        initializer_range=fields["initializer_range"],
        module_names=tuple(family.module_names.items()),
    )


def _checked_fields(config: Fields, where: str) -> tuple[Fields, Family]:
    """Checks the fields of a config.json; returns them with the defaults of its family, and the family.

    Raises:
      UserError: as `from_hf`.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{where}: model_type {name!r} is not supported; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    known = family.defaults.keys() | {*limits.REQUIRED} | limits.HARMLESS | _ROPE_FIELDS
    for field, value in config.items():
        if field not in known and value not in (None, False, [], {}):
            raise UserError(
                f"{where}: field {field} = {value!r} is not known for {name}; if it does not change the model's "
                "output, delete it from the file, else this model is not supported"
            )
    fields = {**family.defaults, **{field: value for field, value in config.items() if field in known}}
    limits.check(fields, family.defaults, where)
    return fields, family


def _layer_types(fields: Fields, family: Family, where: str) -> list[str]:
    """ "full_attention" or "sliding_attention" for each layer."""
    layers, types = fields["num_hidden_layers"], fields.get("layer_types")
    if types is None:
        types = ["sliding_attention" if family.slides(i, fields) else "full_attention" for i in range(layers)]
    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{where}: layer_types {types} must name full_attention or sliding_attention for {layers} layers"
        )
    off = fields.get("sliding_window") is None or not fields.get("use_sliding_window", True)
    return ["full_attention"] * layers if off else types


def _ropes(
    config: Fields, fields: Fields, family: Family, head_dim: int, context: int | None, where: str
) -> dict[str, Rope]:
    """The RoPE of each layer type."""
    given = config.get("rope_parameters") or {}
    per_type = {t: given[t] for t in ("full_attention", "sliding_attention") if isinstance(given.get(t), dict)}
    if not per_type:
        full = {"rope_theta": fields["rope_theta"]} | (config.get("rope_scaling") or {}) | given
        local = {"rope_theta": fields[family.local_rope_field]} if family.local_rope_field else full
        per_type = {"full_attention": full, "sliding_attention": local}
    max_positions = fields["max_position_embeddings"]
    return {t: _rope(rope, head_dim, max_positions, context, where) for t, rope in per_type.items()}


def _rope(fields: Fields, head_dim: int, max_positions: int, context: int | None, where: str) -> Rope:
    scaling = fields.get("rope_type", fields.get("type", "default"))
    supported: dict[str, set[str]] = {
        "default": set(),
        "linear": {"factor"},
        "dynamic": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }
    if not isinstance(scaling, str) or scaling not in supported:
        raise UserError(f"{where}: RoPE scaling {scaling!r} is not supported; supported are {', '.join(supported)}")
    limits.NUMBER.check(fields.get("rope_theta"), "rope_theta", where)
    for name, value in fields.items():
        if name not in supported[scaling] | {"rope_type", "type", "rope_theta"} and value not in (None, 1.0):
            raise UserError(f"{where}: RoPE field {name} = {value!r} is not supported for scaling {scaling!r}")
    missing = [name for name in sorted(supported[scaling]) if fields.get(name) is None]
    if missing:
        raise UserError(f"{where}: RoPE scaling {scaling!r} needs the field {missing[0]}")
    for name in sorted(supported[scaling]):
        kind = limits.COUNT if name == "original_max_position_embeddings" else limits.NUMBER
        kind.check(fields[name], name, where)
    rope = Rope(theta=float(fields["rope_theta"]))
    if scaling == "linear":
        return dataclasses.replace(rope, scaling="linear", factor=float(fields["factor"]))
    if scaling == "dynamic":
        # NTK-aware scaling ("dynamic" in transformers), for the fixed length `context`.
        stretch = max(context or 0, max_positions) / max_positions
        growth = float(fields["factor"]) * stretch - (float(fields["factor"]) - 1)
        return dataclasses.replace(rope, theta=rope.theta * growth ** (head_dim / (head_dim - 2)))
    if scaling == "llama3":
        if fields["low_freq_factor"] >= fields["high_freq_factor"]:
            low, high = fields["low_freq_factor"], fields["high_freq_factor"]
            raise UserError(f"{where}: field low_freq_factor is {low}; give a number < high_freq_factor = {high}")
        return dataclasses.replace(
            rope,
            scaling="llama3",
            factor=float(fields["factor"]),
            low_freq_factor=float(fields["low_freq_factor"]),
            high_freq_factor=float(fields["high_freq_factor"]),
            original_context=int(fields["original_max_position_embeddings"]),
        )
    return rope
