"""The `config.json` contents of public models by name, for `plan` and for benchmarks with random weights."""

from typing import Any


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool = True, **fields: Any) -> dict[str, Any]:
    """A config of this family: the fields that all its models share, and the given sizes."""
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40960,
        **fields,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    },
    "qwen3-0.6b": _qwen3(1024, 3072, layers=28, heads=16),
    "qwen3-1.7b": _qwen3(2048, 6144, layers=28, heads=16),
    "qwen3-4b-2507": _qwen3(2560, 9728, layers=36, heads=32, rope_theta=5_000_000.0, max_position_embeddings=262144),
    "qwen3-8b": _qwen3(4096, 12288, layers=36, heads=32, tied=False),
    "qwen3-32b": _qwen3(5120, 25600, layers=64, heads=64, tied=False),
    "granite-3.3-8b": {
        "model_type": "granite",
        "vocab_size": 49159,
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 10_000_000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.0078125,
        "residual_multiplier": 0.22,
        "logits_scaling": 16.0,
    },
    "olmo2-1b": {
        "model_type": "olmo2",
        "vocab_size": 100352,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
    },
}
