"""LoRA adapters against PEFT on torch: log-probabilities, answers, gradients, files, and one line for each mistake."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft as torch_peft
import pytest
import torch
from rows import edit_json
from safetensors.numpy import load_file, save_file
from scoring import log_probs, torch_log_probs

from camopd_jax.config.schema import Adapter, Optimizer
from camopd_jax.errors import UserError
from camopd_jax.method import optimizer
from camopd_jax.models import adapters, hf, partition, peft
from camopd_jax.models.config import from_hf
from camopd_jax.models.peft_settings import base_folder, new_settings, read_settings
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import adapter_rows, check_rows_cover, leaf_of, table
from camopd_jax.rollout import generate
from camopd_jax.runtime.mesh import make_mesh

LENGTH = 23
RANDOM = dict(r=5, lora_alpha=7, target_modules="all-linear")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {  # of families with several matrices in one tensor, or experts, which cannot have an adapter
    **{family: [*ATTENTION, "down_proj"] for family in ("phi3", "phi3-long", "glm", "glm4")},
    **{family: ATTENTION for family in ("qwen3_moe", "olmoe", "mixtral")},
    "gemma4_small": [*ATTENTION, "gate_proj", "up_proj", "down_proj", "per_layer_input_gate", "per_layer_projection"],
    "gemma4_moe": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],  # not the router's
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, 98, (2, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """adapter(family, fields of LoraConfig) -> (model of PEFT with random matrices, its folder).

    `rows`: what the vocabulary is resized to before.
    """

    def make(family, rows=None, **fields):
        source = checkpoint(family)[1]
        model = type(checkpoint(family)[0]).from_pretrained(source, attn_implementation="eager")
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        model = torch_peft.get_peft_model(model, torch_peft.LoraConfig(task_type="CAUSAL_LM", **fields))
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder)
        return model.eval(), folder

    return make


def load(folder, mesh, dtype="float32"):
    """(model, parameters, settings) of an adapter that is not merged."""
    base = from_hf(hf.read_config(base_folder(folder)), context=LENGTH)
    settings = read_settings(folder, base)
    params = hf.load(base_folder(folder), base, mesh, dtype)
    for leaves in (
        peft.scales(settings, base, mesh),
        peft.load_matrices(folder, settings, base, mesh, dtype),
        peft.load_saved(folder, settings, base, mesh, dtype),
    ):
        params = adapters.attach(params, leaves)
    return Model(settings.model_config(base), mesh=mesh, dtype=dtype), params, settings


def without_adapter(model):
    return dataclasses.replace(model, config=dataclasses.replace(model.config, adapter=()))


def raw(folder):
    return {name: (t.dtype, t.shape, t.tobytes()) for name, t in load_file(folder / peft.WEIGHTS).items()}


def test_log_probs_equal_peft(family_or_slow, adapter, mesh, tokens, tmp_path):
    targets = TARGETS.get(family_or_slow, "all-linear")
    torch_model, folder = adapter(family_or_slow, **RANDOM | dict(target_modules=targets))
    model, params, settings = load(folder, mesh)
    expected = torch_log_probs(torch_model, tokens)
    with torch_model.disable_adapter():
        assert np.abs(torch_log_probs(torch_model, tokens) - expected).mean() > 0.02, "the adapter has an effect"
    np.testing.assert_allclose(log_probs(model, params, tokens), expected, atol=3e-5, rtol=0)
    merged, base = (
        adapters.merge(params),
        dataclasses.replace(model, config=dataclasses.replace(model.config, adapter=())),
    )
    check_rows_cover(params, model.config)
    check_rows_cover(merged, base.config)
    np.testing.assert_allclose(log_probs(base, merged, tokens), expected, atol=3e-5, rtol=0)
    peft.save(tmp_path, params, settings, model.config, folder)
    assert raw(tmp_path) == raw(folder)


OPTIONS = {
    "rslora": dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "patterns": dict(
        r=3,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj", "gate_proj"],
        rank_pattern={"q_proj": 5, r"layers.1.self_attn.v_proj": 2},
        alpha_pattern={r"layers\.[02].*gate_proj": 9},
    ),
    "regex": dict(r=3, target_modules=r"model\.layers\.[12]\.(mlp\.(up|down)|self_attn\.o)_proj"),
    "layers": dict(r=3, target_modules=["k_proj", "o_proj"], layers_to_transform=[0, 2], layers_pattern="layers"),
    "one layer": dict(r=3, target_modules=["up_proj"], layers_to_transform=1),
    "excluded": dict(r=3, target_modules="all-linear", exclude_modules=["layers.0.mlp.up_proj", "v_proj"]),
    "excluded by regex": dict(r=3, target_modules=["q_proj", "up_proj"], exclude_modules=r".*\.1\..*"),
    "saved": dict(r=3, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head", "norm", "down_proj"]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_peft(name, adapter, mesh, tmp_path):
    """Which matrices of which layers have an adapter, its rank and scale: the merged weights are those of PEFT."""
    torch_model, folder = adapter("qwen3", **OPTIONS[name])
    model, params, settings = load(folder, mesh)
    peft.save(tmp_path, params, settings, model.config, folder)
    assert raw(tmp_path) == raw(folder)
    merged, theirs = adapters.merge(params), torch_model.merge_and_unload().state_dict()
    for row in table(without_adapter(model).config):
        ours = np.asarray(leaf_of(merged, row.path))
        for i, tensor in enumerate(row.names(model.config.num_layers)):
            same = row.to_hf(ours[i] if row.stacked else ours)
            np.testing.assert_allclose(same, theirs[tensor].numpy(), atol=1e-6, rtol=0, err_msg=tensor)


def test_gradients_on_a_mesh_equal_peft(adapter, tokens):
    """Rows over two devices, heads and widths over two; the rank is not split. The base model has no gradient."""
    torch_model, folder = adapter("qwen3", **RANDOM)
    model, params, settings = load(folder, make_mesh(1, 2, 2, devices=jax.devices()[:4]))
    trained = partition.trained(params, "all")

    def mean(trained):
        logits = model.logits(params, model.hidden(partition.merge(params, trained), tokens))
        return jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], tokens[:, 1:, None], axis=-1))

    gradient = jax.jit(jax.grad(mean))(trained)
    logp = torch.log_softmax(torch_model(torch.tensor(tokens, dtype=torch.long)).logits, -1)
    torch.take_along_dim(logp[:, :-1], torch.tensor(tokens[:, 1:, None], dtype=torch.long), -1).mean().backward()
    theirs = {name.replace(".default", ""): p.grad for name, p in torch_model.named_parameters() if p.requires_grad}
    ours = peft.tensors(gradient, settings, model.config)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        expected = theirs[name].numpy()
        np.testing.assert_allclose(tensor, expected, atol=3e-5 * np.abs(expected).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_weights_for_decoding_are_merged(sizes, adapter):
    _, folder = adapter("qwen3", **RANDOM)
    model, params, _ = load(folder, make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)]))
    base = without_adapter(model)
    ours = generate.for_decoding(model, params)
    theirs = generate.for_decoding(base, adapters.merge(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=0), ours, theirs)
    jax.tree.map(lambda a, place: a.sharding == place or pytest.fail(str(place)), ours, model.decoding_shardings)


def test_padding_of_smaller_ranks_stays_zero(adapter, mesh, tokens):
    """Adam with weight decay moves every stored number and none of the padding."""
    _, folder = adapter("qwen3", **OPTIONS["patterns"])
    model, params, settings = load(folder, mesh)
    before = partition.trained(params, "all")
    state = optimizer.init_state(before)
    config = Optimizer(learning_rate=0.1, weight_decay=0.1)

    @jax.jit
    def step(trained, moments):
        def loss(trained):
            return -jnp.mean(jnp.square(model.hidden(partition.merge(params, trained), tokens)[:, 3:]))

        grads = jax.grad(loss)(trained)
        return optimizer.apply(trained, moments, grads, jnp.float32(0.1), config, jnp.bool_(True))[:2]

    after, moments = before, state.moments["shared"]
    for _ in range(3):
        after, moments = step(after, moments)
    padded = 0
    for row in adapter_rows(model.config):
        if row.path[-1] == "lora_scale":
            continue
        axis = -1 if row.path[-1] == "lora_a" else 0
        for i, rank in enumerate(settings.ranks[row.module]):
            old, new = (np.moveaxis(np.asarray(leaf_of(tree, row.path)[i]), axis, 0) for tree in (before, after))
            assert (new[:rank] != old[:rank]).all(), row.path
            assert not new[rank:].any() and not old[rank:].any(), row.path
            padded += new[rank:].size
    assert padded > 0


def test_a_new_adapter_changes_nothing_and_starts_like_those_of_peft(adapter, checkpoint, mesh):
    source = checkpoint("qwen3")[1]
    base = from_hf(hf.read_config(source))
    settings = new_settings(Adapter(rank=8, alpha=4.0, targets=("q_proj", "down_proj")), base, str(source))
    config = settings.model_config(base)
    leaves = adapters.init(config, jax.random.key(0), 0.5)
    assert {row.path for row in adapter_rows(config)} == {
        ("layers", *module, leaf)
        for module in (("attention", "query"), ("mlp", "down"))
        for leaf in ("lora_a", "lora_b", "lora_scale")
    }
    for module, inputs in ((leaves["layers"]["attention"]["query"], 60), (leaves["layers"]["mlp"]["down"], 56)):
        assert module["lora_a"].shape == (3, inputs, 8) and not module["lora_b"].any()
        assert module["lora_scale"].tolist() == [0.5] * 3
        # Kaiming's uniform with a = sqrt(5): between +- sqrt(6 / ((1 + 5) inputs)), with deviation 1 / sqrt(3)
        bound = inputs**-0.5
        assert 0.95 * bound < np.abs(module["lora_a"]).max() <= bound
        np.testing.assert_allclose(np.std(module["lora_a"]), bound / 3**0.5, rtol=0.05)


@pytest.fixture
def folder(adapter, tmp_path):
    """A copy of an adapter that a test may damage."""
    return shutil.copytree(adapter("qwen3", r=3, target_modules=["q_proj", "up_proj"])[1], tmp_path / "adapter")


SETTINGS = {  # fields of adapter_config.json -> what the error says
    "peft_type is 'IA3'; only LORA": dict(peft_type="IA3"),
    "field use_dora = True is not supported; merge the adapter": dict(use_dora=True),
    "field lora_bias = True": dict(lora_bias=True),
    "field bias is 'lora_only'; only 'none'": dict(bias="lora_only"),
    "field layer_replication = .* is not supported": dict(layer_replication=[[0, 2], [1, 3]]),
    "field use_qalora = True is not supported": dict(use_qalora=True),
    "field target_parameters = .* is not supported": dict(target_parameters=["mlp.experts.down_proj"]),
    "field fan_in_fan_out = True": dict(fan_in_fan_out=True),
    "field trainable_token_indices is .'1'.; give a list of token ids": dict(trainable_token_indices=["1"]),
    "field made_up = 3 is not supported": dict(made_up=3),
    "field init_lora_weights is 'pissa', which changes the base model": dict(init_lora_weights="pissa"),
    "field r .or rank_pattern. is 0; give an integer > 0": dict(r=0),
    "field target_modules is 3; give a string or a list": dict(target_modules=3),
    r"target_modules = .'w1'. matches no module": dict(target_modules=["w1"]),
    "is not a regular expression": dict(rank_pattern={"(": 2}),
    "an adapter of lm_head is not supported": dict(target_modules=["lm_head"]),
    "an adapter of model.embed_tokens is not supported": dict(target_modules=["q_proj", "embed_tokens"]),
    "modules_to_save matches .* in some layers only": dict(modules_to_save=["0.mlp.down_proj"]),
    "base_model_name_or_path is None; give": dict(base_model_name_or_path=None),
    "base_model_name_or_path: no folder ./gone; give": dict(base_model_name_or_path="./gone"),
    "tensor .*up_proj.lora_A.weight .6 in all. has no place": dict(target_modules=["q_proj"]),
    "tensor .*down_proj.lora_A.weight is missing .6 in all.": dict(target_modules=["q_proj", "up_proj", "down_proj"]),
    r"tensor .* has shape \[3, 60\], .* ask for \[2, 60\]": dict(r=2),
}


@pytest.mark.parametrize("message", SETTINGS)
def test_what_is_not_supported_is_one_line(message, folder, mesh):
    edit_json(folder / "adapter_config.json", **SETTINGS[message])
    with pytest.raises(UserError, match=message) as caught:
        load(folder, mesh)
    assert "\n" not in str(caught.value) and str(folder / "adapter_") in str(caught.value)


def test_weights_that_are_missing_or_not_finite(folder, mesh):
    tensors = load_file(folder / peft.WEIGHTS)
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    save_file(tensors | {name: np.full_like(tensors[name], np.nan)}, folder / peft.WEIGHTS)
    with pytest.raises(UserError, match=f"tensor {name} has values that are not finite"):
        load(folder, mesh)
    (folder / peft.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors is missing; .*, or delete adapter_config.json"):
        load(folder, mesh)


def test_names_with_the_adapters_name_and_a_base_beside_it(folder, mesh, tmp_path, checkpoint):
    """Trainers that save without PEFT keep the name `default`; a relative base is looked for beside the adapter too."""
    tensors = load_file(folder / peft.WEIGHTS)
    renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / peft.WEIGHTS)
    shutil.copytree(checkpoint("qwen3")[1], tmp_path / "base_of_this_test")
    edit_json(folder / "adapter_config.json", base_model_name_or_path="../base_of_this_test")
    _, params, settings = load(folder, mesh)
    assert base_folder(folder) == tmp_path / "base_of_this_test"
    saved = peft.tensors(params, settings, settings.model_config(from_hf(hf.read_config(base_folder(folder)))))
    np.testing.assert_equal(saved, tensors)


def test_a_tensor_of_several_matrices(adapter, checkpoint, mesh):
    """phi3 has qkv_proj and gate_up_proj. A new adapter is on the other two."""
    _, folder = adapter("phi3", **RANDOM)
    with pytest.raises(UserError, match="an adapter of model.layers.0.self_attn.qkv_proj, one tensor of several"):
        load(folder, mesh)
    base = from_hf(hf.read_config(checkpoint("phi3")[1]), context=LENGTH)
    assert set(new_settings(Adapter(), base, "base").ranks) == {"attention.output", "mlp.down"}


BOTH = ["embed_tokens", "lm_head"]
FEW = ("resized", "new tokens", "old tokens", "tied, resized", "tied, resized and trained apart")  # the others are slow
VOCABULARIES = {  # (family, rows, fields of LoraConfig); smollm2's embedding and head are one tensor
    "resized": ("qwen3", 101, {}),
    "with fewer rows": ("qwen3", 95, {}),
    "resized and trained": ("qwen3", 101, dict(modules_to_save=BOTH)),
    "resized and trained in part": ("qwen3", 101, dict(modules_to_save=["embed_tokens"])),
    "new tokens": ("qwen3", 101, dict(trainable_token_indices=[100, 98, 99])),
    "old tokens": ("qwen3", None, dict(trainable_token_indices=dict(embed_tokens=[5, 9, 4], lm_head=[6, 9]))),
    "tied, resized": ("smollm2", 101, {}),
    "tied, resized and trained": ("smollm2", 101, dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tied, new tokens": ("smollm2", 101, dict(trainable_token_indices=[98, 100])),
    "tied, old tokens": ("smollm2", None, dict(trainable_token_indices=[9, 5])),
    "tied, trained apart": ("smollm2", None, dict(modules_to_save=BOTH)),
    "tied, resized and trained apart": ("smollm2", 101, dict(modules_to_save=BOTH)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in VOCABULARIES]
)
def test_embedding_and_head_of_an_adapter_are_those_of_peft(name, adapter, checkpoint, mesh, tmp_path):
    """All rows that PEFT has after merging; PEFT loads what is saved onto the resized base with the same weights."""
    family, rows, fields = VOCABULARIES[name]
    torch_model, folder = adapter(family, rows, r=3, target_modules=["q_proj"], **fields)
    model, params, settings = load(folder, mesh)
    peft.save(tmp_path, params, settings, model.config, folder)
    base = type(checkpoint(family)[0]).from_pretrained(checkpoint(family)[1], attn_implementation="eager")
    if rows:
        base.resize_token_embeddings(rows, mean_resizing=False)
    again = torch_peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    theirs = torch_model.merge_and_unload()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in theirs.state_dict().items())
    embedding, head = (layer.weight.detach().numpy() for layer in (theirs.model.embed_tokens, theirs.lm_head))
    assert model.config.vocab_size == len(embedding) == (rows or 98)
    assert model.config.tied_head == ("head" not in params) == np.array_equal(embedding, head)
    np.testing.assert_array_equal(params["embedding"], embedding)
    if not model.config.tied_head:
        np.testing.assert_array_equal(params["head"], head.T)
    check_rows_cover(params, model.config)


@pytest.mark.slow
def test_tokens_without_an_embedding_for_each_layer(adapter, mesh):
    """PEFT saves the resized embedding of Gemma 4, but not its second one."""
    folder = adapter("gemma4_small", rows=112, r=3, target_modules=["q_proj"])[1]
    with pytest.raises(
        UserError, match="the embedding has 112 rows, but the base model's embedding for each layer only"
    ):
        load(folder, mesh)


@pytest.mark.parametrize("name", ["new tokens", pytest.param("tied, resized", marks=pytest.mark.slow)])
def test_log_probs_with_a_resized_vocabulary_equal_peft(name, adapter, mesh, tokens):
    family, rows, fields = VOCABULARIES[name]
    torch_model, folder = adapter(family, rows, r=3, target_modules=["q_proj"], **fields)
    model, params, _ = load(folder, mesh)
    tokens = np.where(tokens % 7 == 0, 100, tokens).astype(np.int32)  # with a new one
    expected = torch_log_probs(torch_model, tokens)
    np.testing.assert_allclose(log_probs(model, params, tokens), expected, atol=3e-5, rtol=0)


def test_a_vocabulary_in_part(adapter, mesh):
    """The head of a tied model stays the base's embedding, if PEFT trains the embedding alone."""
    _, tied = adapter("smollm2", r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(UserError, match="modules_to_save has the embedding or the head, but not both, .*tie_word"):
        load(tied, mesh)
    _, folder = adapter("qwen3", 101, r=3, target_modules=["q_proj"], trainable_token_indices=[98, 99])
    edit_json(folder / "adapter_config.json", trainable_token_indices=[98, 101])
    with pytest.raises(UserError, match=r"trainable_token_indices has 2 tokens for .* shape \[2, 60\] and 101 rows"):
        load(folder, mesh)
    edit_json(folder / "adapter_config.json", trainable_token_indices=[98])
    with pytest.raises(UserError, match="trainable_token_indices has 1 tokens"):
        load(folder, mesh)
    tensors = load_file(folder / peft.WEIGHTS)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, folder / peft.WEIGHTS)
    with pytest.raises(UserError, match=r"embedding and head have different numbers of rows, \[98, 101\]; merge"):
        load(folder, mesh)
