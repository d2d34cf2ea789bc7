"""A run of Gemma 4, whose layers have attention of different shapes, on several devices."""

import numpy as np
import pytest
import torch
import transformers
from random_pairs import FLAGS, TEXT, save_pair
from rows import read_lines
from safetensors.numpy import load_file

LAYERS = dict(
    num_hidden_layers=2,
    global_head_dim=10,
    num_global_key_value_heads=4,
    attention_k_eq_v=True,
    hidden_size_per_layer_input=0,
    sliding_window=7,
    layer_types=["sliding_attention", "full_attention"],
)
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    position_embedding_size=16,
)  # fmt: skip


@pytest.fixture
def models(tmp_path):
    """Flags with a random model with a vision tower, and a copy with other weights."""
    torch.manual_seed(0)
    config = transformers.Gemma4Config(text_config=TEXT | LAYERS, vision_config=VISION, eos_token_id=5)
    model = transformers.Gemma4ForConditionalGeneration(config)
    return save_pair(model, tmp_path, model.model.language_model)


@pytest.mark.slow
def test_all_of_the_text_model_is_trained_but_its_scalars(models, command, tmp_path):
    flags = [
        "--config.steps=1",
        "--config.rollout.max_response_tokens=8",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
    ]
    ended = command("train", f"--workdir={tmp_path / 'run'}", *FLAGS, *models, *flags, devices=4)
    assert ended.code == 0, ended.err
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["phase"] for row in rows] == ["recovery"]
    assert all(np.isfinite(row["loss"]) for row in rows)
    after = load_file(tmp_path / "run" / "export" / "model.safetensors")
    before = load_file(tmp_path / "specialised" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        trained = "language_model." in name and not name.endswith("layer_scalar")
        assert (tensor != before[name]).any() == trained, name
    transformers.Gemma4ForConditionalGeneration.from_pretrained(tmp_path / "run" / "export")
