"""Checkpoints with a vision model: the text model against transformers, and the other tensors in exports."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from etils import epath
from rows import edit_json
from safetensors.numpy import load_file

from camopd_jax.errors import UserError
from camopd_jax.inference.loading import Loaded
from camopd_jax.models import hf
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.runs import export
from camopd_jax.runtime.mesh import make_mesh

TEXT = dict(
    vocab_size=98,
    hidden_size=60,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=14,
    max_position_embeddings=64,
    pad_token_id=0,
)
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28)
KINDS = {
    "gemma3": (
        "Gemma3",
        dict(text_config=TEXT | dict(query_pre_attn_scalar=11, sliding_window=5), mm_tokens_per_image=4),
    ),
    "gemma4": (
        "Gemma4",
        dict(
            text_config=TEXT
            | dict(
                hidden_size_per_layer_input=0,
                sliding_window=5,
                layer_types=["sliding_attention", "full_attention", "full_attention"],
                global_head_dim=22,
                num_global_key_value_heads=3,
                attention_k_eq_v=True,
            )
        ),
    ),
    "mistral3": (
        "Mistral3",
        dict(
            text_config=TEXT
            | dict(
                model_type="ministral3",
                rope_parameters=dict(
                    rope_type="yarn",
                    rope_theta=1e4,
                    factor=4.0,
                    original_max_position_embeddings=16,
                    llama_4_scaling_beta=0.2,
                ),
            ),
            tie_word_embeddings=False,
        ),
    ),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=1, devices=jax.devices()[:1])


@pytest.fixture(scope="module", params=["gemma3", pytest.param("gemma4", marks=pytest.mark.slow), "mistral3"])
def checkpoint(request, tmp_path_factory):
    """(torch model, its folder)."""
    name, fields = KINDS[request.param]
    vision = VISION | dict(patch_size=14)
    images = dict(vision_config=vision, image_token_index=99)
    if name == "Gemma4":
        del vision["image_size"]
        images = dict(vision_config=vision | dict(num_key_value_heads=2, head_dim=8, position_embedding_size=16))
    config = getattr(transformers, f"{name}Config")(**fields, **images)
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}ForConditionalGeneration")._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        scalars = [constant for name, constant in model.named_buffers() if name.endswith("layer_scalar")]  # of Gemma 4
        for parameter in [*model.parameters(), *scalars]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return model, folder


def load(folder, mesh):
    config = from_hf(hf.read_config(folder), where=str(folder / "config.json"))
    model = Model(config, mesh=mesh)
    return Loaded(folder, mesh, model, hf.load(folder, config, mesh, "float32"), None, ())


def test_text_has_the_log_probabilities_of_transformers(checkpoint, mesh):
    torch_model, folder = checkpoint
    tokens = np.random.default_rng(0).integers(3, 98, (2, 23))
    loaded = load(folder, mesh)
    logits = loaded.model.logits(loaded.params, loaded.model.hidden(loaded.params, jnp.asarray(tokens, jnp.int32)))
    with torch.no_grad():
        expected = torch.log_softmax(torch_model(input_ids=torch.tensor(tokens)).logits, -1)
    np.testing.assert_allclose(jax.nn.log_softmax(logits), expected.numpy(), atol=2e-5, rtol=0)


def test_an_export_has_all_tensors_byte_for_byte(checkpoint, mesh, tmp_path):
    """Training changes those of the text model only."""
    _, folder = checkpoint
    loaded = load(folder, mesh)
    export.write_folder(epath.Path(tmp_path / "same"), loaded, {"method": "copying", "model": "it"})
    source, written = (
        {n: t.tobytes() for n, t in load_file(f / "model.safetensors").items()} for f in (folder, tmp_path / "same")
    )
    assert written == source
    assert any("vision_tower." in name for name in written)
    assert hf.read_config(tmp_path / "same") == hf.read_config(folder)
    assert (tmp_path / "same" / "preprocessor_config.json").exists()

    trained = dataclasses.replace(loaded, params=jax.tree.map(lambda p: p + 1, loaded.params))
    export.write_folder(epath.Path(tmp_path / "trained"), trained, {"method": "adding", "model": "it"})
    after = {n: t.tobytes() for n, t in load_file(tmp_path / "trained" / "model.safetensors").items()}
    changed = {name for name in source if after[name] != source[name]}
    assert changed == {name for name in source if "language_model." in name}


def test_mistakes_are_named(checkpoint, mesh, tmp_path):
    folder = shutil.copytree(checkpoint[1], tmp_path / "model")
    good = (folder / "config.json").read_text()
    for changes, message in [
        ({"text_config": None}, "config.json: field text_config is None; give an object"),
        ({"sparse_topk": 8}, "config.json: field sparse_topk = 8 is not known for"),
        ({"text_config": json.loads(good)["text_config"] | {"num_experts": 8}}, "text_config: field num_experts = 8"),
        (
            {"text_config": json.loads(good)["text_config"] | {"hidden_size": -1}},
            "text_config: field hidden_size is -1",
        ),
    ]:
        edit_json(folder / "config.json", **changes)
        with pytest.raises(UserError, match=message):
            load(folder, mesh)
        (folder / "config.json").write_text(good)


def test_gemma3_configs_of_the_hub_leave_out_what_transformers_knows():
    """The 4B model's: heads, head width and vocabulary are defaults."""
    text = dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, sliding_window=1024)
    text |= dict(model_type="gemma3_text", rope_scaling={"factor": 8.0, "rope_type": "linear"})
    config = from_hf(dict(model_type="gemma3", text_config=text, vision_config={}, mm_tokens_per_image=256))
    theirs = transformers.Gemma3Config(text_config=text).text_config
    assert (config.vocab_size, config.num_heads, config.num_kv_heads) == (262208, 8, 4)
    assert (theirs.vocab_size, theirs.num_attention_heads, theirs.num_key_value_heads) == (262208, 8, 4)
    assert config.tensor_prefix == "language_model." and config.tied_head
    assert [window is None for window in config.windows] == [t == "full_attention" for t in theirs.layer_types]
