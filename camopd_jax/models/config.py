"""What a decoder-only transformer is, read from a Hugging Face `config.json`.

Architectures are described by their properties, never by name: whoever reads the layers meets no family.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from jax.sharding import Mesh

from camopd_jax.errors import UserError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the angle of pair i at position p is `p * frequency_i`."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only, as the next two
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
    activation: Literal["silu", "gelu_tanh"]
    ropes: tuple[Rope, ...]
    layer_rope: tuple[int, ...]  # which of `ropes` a layer uses
    windows: tuple[int | None, ...]  # how many positions a layer sees, the token's own included; None: all
    query_scale: float  # factor on q.k
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False  # norms after attention and feed-forward too
    norm_offset: float = 0.0  # added to a norm's weight
    embed_scale: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None
    initializer_range: float = 0.02
    output_vocab_size: int | None = None  # logits are cut to this; None: vocab_size

    @property
    def distinct_windows(self) -> tuple[int | None, ...]:
        """The different `windows`, each once."""
        return tuple(dict.fromkeys(self.windows))


Implementation = Literal["auto", "xla", "fused"]


@dataclass(frozen=True)
class AttentionSpec:
    """What the attention of a model's layers has in common."""

    windows: tuple[int | None, ...]  # the different windows of the layers, None where a layer sees everything
    scale: float  # factor on q.k, before `softcap * tanh(scores / softcap)`
    softcap: float | None = None
    # Of whole rows. "fused": the platform's kernel; "auto": the kernel where the rows are long enough for it and divide
    # over the mesh; "xla": plain products, as always over a cache.
    implementation: Implementation = "xla"
    mesh: Mesh | None = None  # what rows and heads are split over; None: one device


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# What transformers takes where a config.json is silent.
_LLAMA = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0,
    "max_position_embeddings": 2048, "num_key_value_heads": None, "head_dim": None, "attention_bias": False,
    "mlp_bias": False, "initializer_range": 0.02,
}  # fmt: skip
_QWEN = _LLAMA | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
                  "max_position_embeddings": 32768}  # fmt: skip
_GEMMA = _LLAMA | {
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None, "max_position_embeddings": 8192,
    "num_key_value_heads": 4,
}  # fmt: skip
_DEFAULTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131_072},
    "qwen2": _QWEN | {"num_key_value_heads": 32},
    "qwen3": _QWEN | {"num_key_value_heads": 32, "head_dim": 128},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA | {
        "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "max_position_embeddings": 131_072,
    },
}  # fmt: skip

# Fields that change no number here: names, special tokens, regularisers of training, caches, what files hold.
_HARMLESS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "sep_token_id", "attention_dropout", "hidden_dropout", "pretraining_tp",
    "name_or_path", "_name_or_path", "id2label", "label2id", "problem_type", "return_dict", "cache_implementation",
    "output_attentions", "output_hidden_states", "is_llama_config", "tokenizer_class", "transformers.js_config",
    "_attn_implementation_autoset", "attn_implementation", "chunk_size_feed_forward", "is_encoder_decoder",
    "unsloth_version", "unsloth_fixed", "hidden_act", "_sliding_window_pattern", "task_specific_params",
}  # fmt: skip
_ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters"}


def from_hf(config: dict[str, Any], *, context: int | None = None, where: str = "config.json") -> ModelConfig:
    """Reads a config.json, as transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`) writes it.

    Args:
      context: the longest sequence of the run, in tokens. "dynamic" RoPE scaling depends on it: it is
        resolved once, so that a row never depends on its neighbours. Other kinds do not.
      where: how errors name the file.

    Raises:
      UserError: for an unknown architecture, and for any field that would change the maths unread.
    """
    family = config.get("model_type")
    if family not in _DEFAULTS:
        raise UserError(f"{where}: model_type {family!r} is not supported; one of {', '.join(_DEFAULTS)} is")
    known = _DEFAULTS[family].keys() | {*_REQUIRED} | _HARMLESS | _ROPE_FIELDS
    for name, value in config.items():
        if name not in known and value not in (None, False, [], {}):
            raise UserError(
                f"{where}: field {name} = {value!r} is not understood for {family} and may change the "
                "model's maths; use a checkpoint without it"
            )
    for name in _REQUIRED:
        if not isinstance(config.get(name), int):
            raise UserError(f"{where}: field {name} is {config.get(name)!r}; a whole number is needed")
    get = (_DEFAULTS[family] | config).get

    gemma = family.startswith("gemma")
    heads = get("num_attention_heads")
    head_dim = get("head_dim") or get("hidden_size") // heads
    activation = get("hidden_activation") if gemma else get("hidden_act")
    activations = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if activation not in activations:
        raise UserError(f"{where}: activation {activation!r} is not supported; one of {', '.join(activations)} is")
    types = _layer_types(family, get, where)
    ropes = _ropes(config, family, get, head_dim, context, where)
    return ModelConfig(
        vocab_size=get("vocab_size"),
        hidden_size=get("hidden_size"),
        intermediate_size=get("intermediate_size"),
        num_layers=get("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=get("num_key_value_heads") or heads,
        head_dim=head_dim,
        norm_eps=get("rms_norm_eps"),
        tied_head=get("tie_word_embeddings"),
        activation=activations[activation],
        ropes=tuple(dict.fromkeys(ropes.values())),
        layer_rope=tuple(list(dict.fromkeys(ropes.values())).index(ropes[t]) for t in types),
        windows=tuple(get("sliding_window") if t == "sliding_attention" else None for t in types),
        query_scale=get("query_pre_attn_scalar", head_dim) ** -0.5,
        qkv_bias=family == "qwen2" or get("attention_bias"),
        output_bias=family != "qwen2" and get("attention_bias"),
        mlp_bias=get("mlp_bias"),
        qk_norm=family in ("qwen3", "gemma3_text"),
        post_norms=gemma,
        norm_offset=1.0 if gemma else 0.0,
        embed_scale=get("hidden_size") ** 0.5 if gemma else 1.0,
        attention_softcap=get("attn_logit_softcapping"),
        final_softcap=get("final_logit_softcapping"),
        initializer_range=get("initializer_range"),
    )


def _layer_types(family: str, get, where: str) -> list[str]:
    """ "full_attention" or "sliding_attention" for each layer."""
    layers = get("num_hidden_layers")
    types = get("layer_types")
    if types is None:
        sliding = {
            "llama": lambda i: False,
            "mistral": lambda i: True,
            "qwen2": lambda i: i >= get("max_window_layers"),
            "qwen3": lambda i: i >= get("max_window_layers"),
            "gemma2": lambda i: i % 2 == 0,
            "gemma3_text": lambda i: (i + 1) % get("sliding_window_pattern") != 0,
        }[family]
        types = ["sliding_attention" if sliding(i) else "full_attention" for i in range(layers)]
    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{where}: layer_types {types} must name full_attention or sliding_attention for {layers} layers"
        )
    off = get("sliding_window") is None or not get("use_sliding_window", True)
    return ["full_attention"] * layers if off else types


def _ropes(config: dict, family: str, get, head_dim: int, context: int | None, where: str) -> dict[str, Rope]:
    """The RoPE of each layer type."""
    given = config.get("rope_parameters") or {}
    per_type = {t: given[t] for t in ("full_attention", "sliding_attention") if isinstance(given.get(t), dict)}
    if not per_type:
        full = {"rope_theta": get("rope_theta")} | (config.get("rope_scaling") or {}) | given
        local = {"rope_theta": get("rope_local_base_freq")} if family == "gemma3_text" else full
        per_type = {"full_attention": full, "sliding_attention": local}
    max_positions = get("max_position_embeddings")
    return {t: _rope(fields, head_dim, max_positions, context, where) for t, fields in per_type.items()}


def _rope(fields: dict[str, Any], head_dim: int, max_positions: int, context: int | None, where: str) -> Rope:
    kind = fields.get("rope_type", fields.get("type", "default"))
    understood = {
        "default": set(),
        "linear": {"factor"},
        "dynamic": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }
    if kind not in understood:
        raise UserError(f"{where}: RoPE scaling {kind!r} is not supported; one of {', '.join(understood)} is")
    for name, value in fields.items():
        if name not in understood[kind] | {"rope_type", "type", "rope_theta"} and value not in (None, 1.0):
            raise UserError(f"{where}: RoPE field {name} = {value!r} is not understood for scaling {kind!r}")
    missing = [name for name in understood[kind] if fields.get(name) is None]
    if missing:
        raise UserError(f"{where}: RoPE scaling {kind!r} needs the field {missing[0]}")
    rope = Rope(theta=float(fields["rope_theta"]))
    if kind == "linear":
        return dataclasses.replace(rope, kind="linear", factor=float(fields["factor"]))
    if kind == "dynamic":
        # NTK-aware scaling (transformers' "dynamic"), at the one length the run is planned for.
        stretch = max(context or 0, max_positions) / max_positions
        growth = float(fields["factor"]) * stretch - (float(fields["factor"]) - 1)
        return dataclasses.replace(rope, theta=rope.theta * growth ** (head_dim / (head_dim - 2)))
    if kind == "llama3":
        return Rope(
            rope.theta,
            "llama3",
            float(fields["factor"]),
            float(fields["low_freq_factor"]),
            float(fields["high_freq_factor"]),
            int(fields["original_max_position_embeddings"]),
        )
    return rope
