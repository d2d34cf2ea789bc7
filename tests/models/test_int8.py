"""Frozen kernels in int8, against float32 models on torch whose linear layers are rounded by a few lines here."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft as torch_peft
import pytest
import torch
from safetensors.numpy import load_file
from scoring import log_probs, torch_log_probs

from camopd_jax.errors import UserError
from camopd_jax.models import adapters, hf, partition, peft, quantised
from camopd_jax.models.config import from_hf
from camopd_jax.models.peft_settings import base_folder, is_adapter, read_settings
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import check_rows_cover, file_rows, in_int8, leaf_of
from camopd_jax.rollout import generate
from camopd_jax.runtime.mesh import make_mesh
from camopd_jax.types import EMPTY

LENGTH = 23
# One tensor of several matrices, experts and a router, biases, a tied head
FAMILIES = ["phi3", "mixtral", "qwen2", "smollm2"]


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, 72, (4, LENGTH)).astype(np.int32)


def mesh_of(*sizes):
    return make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])


def load(folder, mesh, int8=True):
    """(model, parameters) of a folder, with its adapter if it is one."""
    config = dataclasses.replace(from_hf(hf.read_config(base_folder(folder)), context=LENGTH), int8=int8)
    params = hf.load(base_folder(folder), config, mesh, "float32")
    if not is_adapter(folder):
        return Model(config, mesh=mesh), params
    settings = read_settings(folder, config)
    for leaves in (
        peft.scales(settings, config, mesh),
        peft.load_matrices(folder, settings, config, mesh, "float32"),
        peft.load_saved(folder, settings, config, mesh, "float32"),
    ):
        params = adapters.attach(params, leaves)
    return Model(settings.model_config(config), mesh=mesh), params


def rounded(model):
    """A torch model whose layers' matrices are rounded to 255 steps of each row, embedding, head and routers not."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            matrix = (
                weight.ndim >= 2 and ".layers." in name and "router" not in name and not name.endswith("gate.weight")
            )
            if matrix:
                step = weight.abs().amax(-1, keepdim=True) / 127
                weight.copy_(torch.round(weight / step) * step)
    return model.eval()


@pytest.mark.gpu
@pytest.mark.parametrize("family", [FAMILIES[0], *(pytest.param(of, marks=pytest.mark.slow) for of in FAMILIES[1:])])
def test_log_probs_equal_torch_with_rounded_weights(family, checkpoint, tokens):
    torch_model, folder = checkpoint(family)
    model, params = load(folder, mesh_of(1, 1, 1))
    check_rows_cover(params, model.config)
    ours = log_probs(model, params, tokens)
    np.testing.assert_allclose(ours, torch_log_probs(rounded(torch_model), tokens), atol=3e-5, rtol=0)
    difference = np.abs(ours - torch_log_probs(torch_model, tokens))
    assert 1e-3 < difference.mean() < 0.02 and difference.max() < 0.1  # nats; in mixtral, other experts are chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_each_weight_is_rounded_by_at_most_half_a_step(family, checkpoint):
    """All other parameters are those of the file; the scales of a fused tensor's matrices are their own."""
    folder = checkpoint(family)[1]
    (_, exact), (model, params) = (load(folder, mesh_of(1, 1, 1), int8) for int8 in (False, True))
    kernels = 0
    for row in file_rows(model.config):
        theirs, ours = (np.asarray(leaf_of(tree, row.path)) for tree in (exact, params))
        if not in_int8(row):
            assert "kernel" not in row.path or "router" in row.path
            np.testing.assert_array_equal(ours, theirs)
            continue
        kernels += 1
        scale = np.asarray(leaf_of(params, (*row.path[:-1], "kernel_scale")))
        inputs = tuple(range(len(row.stack(3)), ours.ndim - row.outputs))
        step = np.expand_dims(scale, inputs)
        assert ours.dtype == np.int8 and (np.abs(ours).max(inputs) == 127).all()
        assert (np.abs(ours * step - theirs) <= step * (0.5 + 1e-5)).all(), row.path
    assert kernels == 7


def test_an_output_whose_weights_are_all_zero():
    kernel = np.array([[0.0, 2.0], [0.0, -0.5]], np.float32)
    scale = quantised.scales(kernel, 1)
    np.testing.assert_array_equal(quantised.quantise(kernel, scale), [[0, 127], [0, -32]])  # 0.5 / 2 x 127 = 31.75
    np.testing.assert_allclose(scale, [0, 2 / 127], rtol=1e-7)


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """(a model of PEFT with random matrices on rounded weights, the folder of its adapter on the exact ones)."""
    model = torch_peft.get_peft_model(
        rounded(checkpoint("qwen3")[0]),
        torch_peft.LoraConfig(task_type="CAUSAL_LM", r=5, lora_alpha=7, target_modules="all-linear"),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = str(checkpoint("qwen3")[1])
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return model.eval(), folder


@pytest.mark.parametrize("sizes", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_an_adapter_on_rounded_weights(sizes, adapter, tokens):
    """Log-probabilities, gradients and decoding; the exported adapter has the bits of the file."""
    torch_model, folder = adapter
    model, params = load(folder, mesh_of(*sizes))
    settings = read_settings(folder, dataclasses.replace(model.config, adapter=()))
    expected = torch_log_probs(torch_model, tokens)
    np.testing.assert_allclose(log_probs(model, params, tokens), expected, atol=3e-5, rtol=0)

    def mean(trained):
        logits = model.logits(params, model.hidden(partition.merge(params, trained), tokens))
        return jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], tokens[:, 1:, None], axis=-1))

    gradient = jax.jit(jax.grad(mean))(partition.trained(params, "all"))
    torch_model.zero_grad()
    logp = torch.log_softmax(torch_model(torch.tensor(tokens, dtype=torch.long)).logits, -1)
    torch.take_along_dim(logp[:, :-1], torch.tensor(tokens[:, 1:, None], dtype=torch.long), -1).mean().backward()
    ours = peft.tensors(gradient, settings, model.config)
    for name, parameter in torch_model.named_parameters():
        if parameter.requires_grad:
            theirs = parameter.grad.numpy()
            tensor = ours.pop(name.replace(".default", ""))
            np.testing.assert_allclose(tensor, theirs, atol=5e-5 * np.abs(theirs).max(), rtol=0, err_msg=name)
    assert not ours

    decoding = generate.for_decoding(model, params)
    jax.tree.map(lambda a, place: a.sharding == place or pytest.fail(str(place)), decoding, model.decoding_shardings)
    kernel = decoding["layers"][1]["mlp"]["down"]["kernel"]
    assert kernel.dtype == jnp.int8 and "lora_a" in decoding["layers"][1]["mlp"]["down"]
    hidden, cache = jax.jit(model.prefill)(decoding, tokens, np.full(4, LENGTH, np.int32))
    assert not (np.asarray(cache.positions) == EMPTY).any()
    logp = jax.nn.log_softmax(model.logits(decoding, hidden))
    ours = np.take_along_axis(np.asarray(logp)[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(ours, expected, atol=3e-5, rtol=0)

    saved = peft.tensors(params, settings, model.config)
    for name, tensor in load_file(folder / peft.WEIGHTS).items():
        np.testing.assert_array_equal(saved[name], tensor)


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2)])
def test_a_mesh_reads_the_same_numbers(sizes, checkpoint):
    """A scale depends on all inputs of an output, of which a device has a part."""
    one, several = (load(checkpoint("mixtral")[1], mesh_of(*of))[1] for of in ((1, 1, 1), sizes))
    jax.tree.map(np.testing.assert_array_equal, one, several)


@pytest.mark.slow
def test_a_matrix_that_an_adapter_replaces(checkpoint, tokens, tmp_path):
    """`modules_to_save`: the replaced matrices are rounded like the others."""
    model = torch_peft.get_peft_model(
        copy.deepcopy(checkpoint("qwen3")[0]),
        torch_peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj", "lm_head"]),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    model.peft_config["default"].base_model_name_or_path = str(checkpoint("qwen3")[1])
    model.save_pretrained(tmp_path)
    expected = torch_log_probs(rounded(model.merge_and_unload()), tokens)
    np.testing.assert_allclose(log_probs(*load(tmp_path, mesh_of(1, 1, 1)), tokens), expected, atol=3e-5, rtol=0)


def test_a_value_that_is_not_finite(checkpoint, tmp_path):
    torch_model, _ = checkpoint("qwen3")
    model = copy.deepcopy(torch_model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    config = dataclasses.replace(from_hf(hf.read_config(tmp_path)), int8=True)
    with pytest.raises(UserError, match=r"tensor model.layers.1.mlp.up_proj.weight has values that are not finite"):
        hf.load(tmp_path, config, mesh_of(1, 1, 1), "float32")


STACKED = {  # where the tensors are, and the part of each matrix as [experts, inputs, outputs]
    "gpt_oss": ("mlp.experts", {"gate": np.s_[..., 0::2], "up": np.s_[..., 1::2], "down": np.s_[...]}),
    "gemma4_moe": ("experts", {"gate": np.s_[:, :, :20], "up": np.s_[:, :, 20:], "down": np.s_[...]}),
}


@pytest.mark.parametrize("family", STACKED)
def test_experts_in_one_tensor_have_a_scale_for_each_output(family, checkpoint):
    """In shards on four devices."""
    folder, (module, parts) = checkpoint(family)[1], STACKED[family]
    stored = load_file(folder / "model.safetensors")
    model, params = load(folder, mesh_of(1, 2, 2))
    check_rows_cover(params, model.config)
    for name, part in parts.items():
        leaves = params["layers"][module.split(".")[0]][name]
        tensor = "down_proj" if name == "down" else "gate_up_proj"
        of_layers = [stored[f"model.layers.{i}.{module}.{tensor}"] for i in range(model.config.num_layers)]
        if family == "gemma4_moe":
            of_layers = [matrices.swapaxes(1, 2) for matrices in of_layers]
        kernel = np.stack([matrices[part] for matrices in of_layers])
        step = np.abs(kernel).max(axis=2) / 127  # [layers, experts, outputs]
        np.testing.assert_allclose(leaves["kernel_scale"], step, rtol=1e-6)
        np.testing.assert_array_equal(leaves["kernel"], np.round(kernel / step[:, :, None]))
