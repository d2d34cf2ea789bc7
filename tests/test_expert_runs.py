"""A run of a mixture of experts whose experts are divided over devices: the same as on one device."""

import numpy as np
import pytest
import torch
import transformers
from random_pairs import FLAGS, TEXT, save_pair
from rows import read_lines
from safetensors.numpy import load_file

EXPERTS = dict(num_hidden_layers=1, moe_intermediate_size=10, num_experts=6, num_experts_per_tok=2)
LENGTH = ["--config.steps=2", "--config.rollout.max_response_tokens=16"]


@pytest.fixture
def models(tmp_path):
    """Flags with a random model and a copy with other weights."""
    torch.manual_seed(0)
    return save_pair(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TEXT, **EXPERTS)), tmp_path)


@pytest.mark.slow
def test_experts_on_two_groups_of_devices_train_like_on_one_device(models, command, tmp_path):
    meshes = {
        "one": ([], 1),
        "eight": (["--config.mesh.data=2", "--config.mesh.tensor=2", "--config.mesh.expert=2"], 8),
    }
    started = {
        name: command.start("train", f"--workdir={tmp_path / name}", *FLAGS, *LENGTH, *models, *mesh, devices=devices)
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
