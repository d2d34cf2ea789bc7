"""What is special to gpt-oss: attention sinks, and experts in 4-bit floats, as transformers dequantises them."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import torch
from rows import edit_json
from safetensors.torch import load_file, save_file
from scoring import log_probs, torch_log_probs
from transformers import GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from camopd_jax.errors import UserError
from camopd_jax.models import cached, fused, hf
from camopd_jax.models.config import from_hf
from camopd_jax.models.shapes import SHAPES
from camopd_jax.models.transformer import Model
from camopd_jax.runtime.mesh import make_mesh

EXPERTS, WIDTH = 3, 64


@pytest.fixture
def model(checkpoint, tmp_path):
    """A folder with quantised experts, and the torch model that transformers' dequantisation makes of it."""
    config = checkpoint("gpt_oss")[0].config.to_dict()
    config |= dict(hidden_size=WIDTH, intermediate_size=32, num_local_experts=EXPERTS, num_hidden_layers=2)
    config |= dict(layer_types=None, dtype="bfloat16")
    torch.manual_seed(1)
    torch_model = GptOssForCausalLM._from_config(
        type(checkpoint("gpt_oss")[0].config)(**config), attn_implementation="eager", dtype=torch.bfloat16
    ).eval()
    folder = tmp_path / "model"
    torch_model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for i, layer in enumerate(torch_model.model.layers):
        experts = layer.mlp.experts
        for part, outputs, inputs in (("gate_up_proj", 64, WIDTH), ("down_proj", WIDTH, 32)):
            blocks = torch.randint(0, 256, (EXPERTS, outputs, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 126, (EXPERTS, outputs, inputs // 32), dtype=torch.uint8)
            name = f"model.layers.{i}.mlp.experts.{part}"
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            getattr(experts, part).data = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    edit_json(folder / "config.json", quantization_config=settings)
    return torch_model, folder


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, devices=jax.devices()[:1])


def test_they_are_dequantised_as_by_transformers_and_saved_in_bfloat16(model, mesh, tmp_path):
    torch_model, folder = model
    fields = hf.read_config(folder)
    config = from_hf(fields)
    params = hf.load(folder, config, mesh, "float32")
    tokens = np.random.default_rng(0).integers(3, 98, (2, 9)).astype(np.int32)
    np.testing.assert_allclose(
        log_probs(Model(config, mesh=mesh, dtype="float32"), params, tokens),
        torch_log_probs(torch_model.float(), tokens),
        atol=2e-5,
        rtol=0,
    )
    hf.save(tmp_path, params, config, fields, hf.tensor_dtypes(folder, config))
    saved = load_file(tmp_path / "model.safetensors")
    for name, expected in torch_model.bfloat16().state_dict().items():
        assert saved[name].dtype == torch.bfloat16 and torch.equal(saved[name], expected), name
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_kernels_without_sinks_are_refused():
    for kernel in (fused, cached):
        with pytest.raises(UserError, match="is 'fused'; no kernel has the attention sinks of this model; give"):
            kernel.check(from_hf(SHAPES["gpt-oss-20b"]), None, "bfloat16")


def test_mistakes_are_named(model, mesh, tmp_path):
    folder = model[1]
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.experts.down_proj"

    def refused(changes, message):
        kept = {n: t for n, t in (tensors | changes).items() if t is not None}
        save_file(kept, folder / "model.safetensors")
        with pytest.raises(UserError, match=message):
            hf.load(folder, from_hf(hf.read_config(folder)), mesh, "float32")

    refused({f"{name}_scales": None}, f"tensor {name}_scales is missing, though {name}_blocks is there")
    refused({f"{name}_scales": tensors[f"{name}_scales"][:, :5].clone()}, re.escape(f"{name}_scales has [3, 5, 1]"))
    refused({f"{name}_scales": torch.full_like(tensors[f"{name}_scales"], 255)}, f"{name} has values that are not fin")
    other = shutil.copytree(folder, tmp_path / "other")
    edit_json(other / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UserError, match=r"is quantised \(bitsandbytes\); give the original"):
        hf.read_config(other)
