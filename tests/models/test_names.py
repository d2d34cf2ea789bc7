"""Checkpoints as other programs save them: what transformers loads gives its numbers, the rest is named."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from rows import edit_json
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_model
from transformers import AutoModel, AutoModelForCausalLM

from camopd_jax.errors import UserError
from camopd_jax.models import hf
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.runtime.mesh import make_mesh

TOKENS = np.random.default_rng(0).integers(3, 98, (2, 17)).astype(np.int32)
TIED = "smollm2"


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint(TIED)[1], tmp_path / "model")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=1, devices=jax.devices()[:1])


def logits(folder, mesh):
    config = from_hf(hf.read_config(folder))
    model, params = Model(config, mesh=mesh), hf.load(folder, config, mesh, "float32")
    return jax.jit(lambda p, t: model.logits(p, model.hidden(p, t)))(params, TOKENS)


def transformers_logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def same_as_transformers(folder, mesh):
    np.testing.assert_allclose(logits(folder, mesh), transformers_logits(folder), atol=3e-5, rtol=0)


def rename(folder, new_name):
    file = folder / "model.safetensors"
    save_file({new_name(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def names(folder):
    return set(hf.tensors(folder))


def exported(folder, mesh, out):
    config = from_hf(hf.read_config(folder))
    out.mkdir()
    params = hf.load(folder, config, mesh, "float32")
    hf.save(out, params, config, hf.read_config(folder), hf.tensor_dtypes(folder, config))
    return out


def write_stale_shard(folder):
    """An index beside model.safetensors, of a file with other weights."""
    old = {name: tensor + np.float32(0.1) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(old, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_one_file_is_read_where_an_index_lies_beside_it(folder, mesh):
    before = transformers_logits(folder)
    write_stale_shard(folder)
    with pytest.warns(UserWarning, match=r"model.safetensors is read; .*index.json .*model-00001-of-00001.safetensors"):
        same_as_transformers(folder, mesh)
    np.testing.assert_array_equal(transformers_logits(folder), before)
    index = folder / "model.safetensors.index.json"
    sound = index.read_text()
    index.write_text("{")  # which is not read
    same_as_transformers(folder, mesh)
    index.write_text(sound)
    (folder / "model.safetensors").unlink()
    same_as_transformers(folder, mesh)  # and the shards, where they are alone
    assert np.abs(transformers_logits(folder) - before).max() > 0.1


def test_a_tied_head_alone(checkpoint, folder, mesh, tmp_path):
    save_model(checkpoint(TIED)[0], folder / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" in names(folder) and "model.embed_tokens.weight" not in names(folder)
    same_as_transformers(folder, mesh)
    out = exported(folder, mesh, tmp_path / "out")
    assert names(out) == names(checkpoint(TIED)[1])
    np.testing.assert_array_equal(transformers_logits(out), transformers_logits(folder))


def test_a_model_that_was_saved_without_its_head(checkpoint, folder, mesh, tmp_path):
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    assert "embed_tokens.weight" in names(folder)
    same_as_transformers(folder, mesh)
    out = exported(folder, mesh, tmp_path / "out")
    assert names(out) == names(checkpoint(TIED)[1])
    np.testing.assert_array_equal(transformers_logits(out), transformers_logits(folder))


def test_a_head_that_is_missing_is_not_made_up(folder, mesh):
    edit_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"tensor lm_head.weight is missing; save the model with its head"):
        logits(folder, mesh)


def test_a_tensor_under_both_names(folder, mesh):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"norm.weight": tensors["model.norm.weight"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tensor model.norm.weight is there twice, with and without 'model.'"):
        logits(folder, mesh)


@pytest.mark.parametrize(
    ("prefix", "advice"),
    [
        ("module.model.", "save the `module` of the DistributedDataParallel model"),
        ("_orig_mod.model.", "save the `_orig_mod` of the compiled model"),
        ("base_model.model.model.", r"call merge_and_unload\(\) of the PEFT model"),
        ("language_model.model.", "save the `language_model` of the multimodal model"),
        ("model.language_model.", "save the `language_model` of the multimodal model"),
        ("policy.model.", "save the model on its own"),
    ],
)
def test_prefixes_that_transformers_does_not_load_either(prefix, advice, folder, mesh):
    before = transformers_logits(folder)
    rename(folder, lambda name: prefix + name.removeprefix("model."))
    assert np.abs(transformers_logits(folder) - before).max() > 1, "transformers makes up random weights"
    said = prefix.removesuffix("model.") if prefix.endswith(".model.") else prefix
    with pytest.raises(UserError, match=rf"names of tensors begin with '{said}' .*; {advice}") as caught:
        logits(folder, mesh)
    assert "\n" not in str(caught.value) and prefix in str(caught.value)


def test_tensors_of_another_model(folder, mesh):
    rename(folder, lambda name: name.replace("q_proj", "w_q"))
    with pytest.raises(
        UserError, match=r"w_q.weight \(3 in all\) has no place .*q_proj.weight \(3 in all\) is missing"
    ):
        logits(folder, mesh)


def test_names_with_model_twice_are_read_as_transformers_reads_them(folder):
    before, tensors = transformers_logits(folder), {n: t.map().copy() for n, t in matching(folder).items()}
    rename(folder, lambda name: "model." + name)
    np.testing.assert_array_equal(transformers_logits(folder), before)
    again = matching(folder)
    assert again.keys() == tensors.keys()
    for name, tensor in again.items():
        np.testing.assert_array_equal(tensor.map(), tensors[name], err_msg=name)


def matching(folder):
    return hf.matching(folder, from_hf(hf.read_config(folder)))
