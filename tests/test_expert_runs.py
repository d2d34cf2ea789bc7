"""A run of a mixture of experts whose experts are divided over devices: the same as on one device."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rows import read_lines
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
FLAGS = [
    f"--config={ROOT / 'configs/quickstart.py'}", "--config.steps=2", "--config.branches.recovery.steps=1",
    "--config.rollout.batch_size=16", "--config.rollout.max_response_tokens=16", "--config.optimizer.micro_batch=8",
    "--config.optimizer.schedule=constant", "--config.optimizer.learning_rate=1e-3", "--config.optimizer.eps=1e-5",
    "--config.compute.remat=none", "--config.evaluation.benchmarks=()", "--config.log.report=false",
]  # fmt: skip
SIZES = dict(
    vocab_size=52,
    hidden_size=24,
    moe_intermediate_size=10,
    intermediate_size=22,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_experts=6,
    num_experts_per_tok=2,
    initializer_range=0.3,
    max_position_embeddings=256,
    eos_token_id=5,
    pad_token_id=0,
    bos_token_id=None,
)


@pytest.fixture
def models(tmp_path):
    """Flags with a random model and a copy with other weights, both with the quickstart's tokenizer."""
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES))
    tokenizer = transformers.AutoTokenizer.from_pretrained(QUICKSTART / "generalist")
    for name in ("general", "specialised"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
    return [f"--config.{name}_model={tmp_path / name}" for name in ("general", "specialised")]


@pytest.mark.slow
def test_experts_on_two_groups_of_devices_train_like_on_one_device(models, command, tmp_path):
    meshes = {
        "one": ([], 1),
        "eight": (["--config.mesh.data=2", "--config.mesh.tensor=2", "--config.mesh.expert=2"], 8),
    }
    started = {
        name: command.start("train", f"--workdir={tmp_path / name}", *FLAGS, *models, *mesh, devices=devices)
        for name, (mesh, devices) in meshes.items()
    }
    for running in started.values():
        ended = running.wait()
        assert ended.code == 0, ended.err
    one, eight = (read_lines(tmp_path / name / "metrics.jsonl") for name in meshes)
    assert [row["phase"] for row in one] == ["recovery", "review"]
    for ours, theirs in zip(eight, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "gap_abs_mean", "gap_mean", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    ours, theirs = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("eight", "one"))
    before = load_file(tmp_path / "specialised" / "model.safetensors")
    assert ours.keys() == theirs.keys() == before.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], atol=2e-5, rtol=0, err_msg=name)  # a step moves it by 1e-3
        assert (tensor != before[name]).any() == ("mlp.gate." not in name), name  # routers are frozen
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "eight" / "export")
