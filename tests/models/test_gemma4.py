"""Gemma 4: what its config.json has beside that of Gemma 3, and layers whose attention has other shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from camopd_jax.analysis.gradients import products
from camopd_jax.config.schema import Adapter
from camopd_jax.errors import UserError
from camopd_jax.models import hf, partition, rope
from camopd_jax.models.config import from_hf
from camopd_jax.models.experts import Experts
from camopd_jax.models.peft_settings import new_settings
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import check_rows_cover, file_rows
from camopd_jax.planning import costs
from camopd_jax.runtime.mesh import make_mesh

FULL, SLIDING = "full_attention", "sliding_attention"
TEXT = dict(
    model_type="gemma4_text", vocab_size=98, hidden_size=60, intermediate_size=56, num_hidden_layers=7,
    num_attention_heads=6, num_key_value_heads=2, head_dim=14, sliding_window=5, hidden_size_per_layer_input=0,
    global_head_dim=22, num_global_key_value_heads=3, attention_k_eq_v=True,
)  # fmt: skip
SMALL = dict(
    num_kv_shared_layers=1, use_double_wide_mlp=True, hidden_size_per_layer_input=8, vocab_size_per_layer_input=100
)
EXPERTS = dict(num_experts=6, top_k_experts=2, moe_intermediate_size=20)


def heads(config):
    """Of each layer, the number and width of the keys' heads, and whether they are values too."""
    of = [config.of_attentions[name] for name in config.layer_attention]
    return [(c.num_kv_heads, c.head_dim, c.keys_as_values) for c in of]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_k_eq_v": False},
        {"num_global_key_value_heads": None},
        {"layer_types": [FULL] * 7},
        {"layer_types": [SLIDING] * 7},
    ],
)
def test_heads_are_those_of_transformers(changes):
    """From the fields of published files, and from those that transformers saves. The last layer has no window."""
    theirs = transformers.Gemma4TextConfig(**TEXT | changes)
    expected = []
    for i, kind in enumerate(theirs.layer_types):
        of = theirs.per_layer_config[i]
        expected.append((of.num_key_value_heads, of.head_dim, theirs.attention_k_eq_v and kind == FULL))
    published = from_hf(TEXT | changes)
    assert heads(published) == expected
    assert heads(from_hf(theirs.to_dict())) == expected
    assert [window is None for window in published.windows] == [kind == FULL for kind in theirs.layer_types]


def test_a_quarter_of_the_pairs_turns_as_in_transformers(checkpoint):
    """Those of the widest layers; the angles are for the whole head."""
    model = checkpoint("gemma4")[0].model
    config = from_hf(model.config.to_dict())
    of = config.global_attention
    ours = rope.frequencies(of.rope, of.head_dim)
    np.testing.assert_allclose(ours, model.rotary_emb.full_attention_inv_freq.numpy(), rtol=1e-6)
    assert np.count_nonzero(ours) == 2  # int(0.25 * 22 / 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"enable_moe_block": True}, "field num_experts is None; give an integer > 0"),
        (
            {"enable_moe_block": True} | EXPERTS | {"top_k_experts": None},
            "field top_k_experts is None; give an integer",
        ),
        ({"enable_moe_block": True} | EXPERTS | {"top_k_experts": 7}, "top_k_experts is 7; num_experts is only 6"),
        (EXPERTS, "field num_experts = 6 needs enable_moe_block = true"),
        (
            {"enable_moe_block": True, "num_kv_shared_layers": 1, "use_double_wide_mlp": True} | EXPERTS,
            "field use_double_wide_mlp is true; with experts only false",
        ),
        (
            {"num_kv_shared_layers": 7},
            "num_kv_shared_layers is 7 of 7 layers; before these layers there must be one of",
        ),
        (
            {"num_kv_shared_layers": 4},
            "num_kv_shared_layers is 4 of 7 layers; before these layers there must be one of",
        ),
        ({"num_kv_shared_layers": -1}, "field num_kv_shared_layers is -1; give an integer >= 0"),
        (
            {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97},
            "vocab_size_per_layer_input is 97, less",
        ),
        ({"use_bidirectional_attention": "all"}, "field use_bidirectional_attention is 'all'"),
        ({"num_global_key_value_heads": 4}, "num_global_key_value_heads is 4, which does not divide"),
        ({"global_head_dim": 21}, "field global_head_dim is 21; RoPE needs an even number"),
        ({"per_layer_config": {"5": {"head_dim": 22}}}, "per_layer_config must have the same head_dim"),
        ({"per_layer_config": {"5": {"head_dim": 22}, "6": {"head_dim": 24}}}, "per_layer_config must have the same"),
        ({"per_layer_config": {"5": {"head_dim": 22, "hidden_size": 8}}}, "per_layer_config must have the same"),
        ({"per_layer_config": {"5": {"head_dim": 0}, "6": {"head_dim": 0}}}, "field head_dim is 0; give an integer"),
    ],
)
def test_what_is_not_supported_is_named(changes, message):
    with pytest.raises(UserError, match=f"^model/config.json.*: {message}"):
        from_hf(TEXT | changes, where="model/config.json")


def test_a_second_embedding_is_the_default_of_transformers():
    text = {name: value for name, value in TEXT.items() if name != "hidden_size_per_layer_input"}
    theirs, ours = transformers.Gemma4TextConfig(**text), from_hf(text).per_layer_input
    assert (ours.size, ours.vocab_size) == (theirs.hidden_size_per_layer_input, theirs.vocab_size_per_layer_input)
    assert from_hf(TEXT).per_layer_input is None


@pytest.mark.parametrize("types, count", [([SLIDING, SLIDING, FULL, SLIDING, FULL], 2), ([FULL] * 5, 3), (None, 1)])
def test_layers_use_the_keys_of_those_of_transformers(types, count):
    """None: by default, every sixth layer and the last one have no window."""
    text = TEXT | dict(num_hidden_layers=5 if types else 7, layer_types=types, num_kv_shared_layers=count)
    modes = transformers.Gemma4TextConfig(**text).kv_sharing_modes
    config = from_hf(text)
    using = [i for i, name in enumerate(config.layer_attention) if config.of_attentions[name].shares_keys]
    assert using == [i for i, mode in enumerate(modes) if mode == "reuse"]
    assert set(config.producers.values()) <= {i for i, mode in enumerate(modes) if mode == "store"}
    for i in using:
        assert config.windows[config.producers[config.layer_attention[i]]] == config.windows[i]


@pytest.mark.parametrize(
    "family, numbers",
    [
        ("gemma4", 2 * 2 * 14 + 2 * 6 * 22),  # two heads of 14 in layers with a window, six of 22 in the others
        ("gemma4_moe", 2 * 14 + 6 * 22),
        ("gemma4_small", 2 * 2 * 14 + 2 * 22),  # of the first three layers
    ],
)
def test_plans_count_its_weights_and_its_cache(family, numbers, checkpoint):
    """The weights of torch."""
    model, _ = checkpoint(family)
    config = from_hf(model.config.to_dict())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert costs.weights(config) == sum(tensor.numel() for tensor in tensors.values())
    assert costs.cache_bytes(config, 2) == 2 * 2 * numbers


def test_a_token_costs_its_experts_and_the_feed_forward_beside_them():
    """60 x 56 in each of three matrices, two of six experts of 60 x 20, and the router."""
    dense, config = from_hf(TEXT), from_hf(TEXT | {"enable_moe_block": True} | EXPERTS)
    more = costs.matrix_weights(config) - costs.matrix_weights(dense)
    assert more == 7 * (6 * 3 * 60 * 20 + 60 * 6)
    assert costs.matrix_weights(config, per_token=True) - costs.matrix_weights(dense) == 7 * (2 * 3 * 60 * 20 + 60 * 6)
    assert costs.expert_weights(config) == 7 * 6 * 3 * 60 * 20
    routers = costs.weights(config) - costs.weights(config, "all")
    assert routers == 7 * (60 * 6 + 6 + 60), "matrix, a factor of each expert, the norm of the input; all are frozen"
    assert partition.frozen_routers(config, "all") and not partition.frozen_routers(config, "router")


def test_a_new_adapter_has_the_matrices_of_both_attentions():
    """Five layers have a window; the values of the two others are their keys."""
    ranks = new_settings(Adapter(rank=3, alpha=4, targets=("k_proj", "v_proj")), from_hf(TEXT), "base").ranks
    assert ranks == {"attention.key": (3,) * 5, "attention.value": (3,) * 5, "global_attention.key": (3,) * 2}


def test_experts_on_several_devices_are_those_of_a_loop_over_tokens():
    """Their router reads another array. 8 devices: 2 for the rows, 2 for the experts, 2 for their widths."""
    config, mesh = from_hf(TEXT | {"enable_moe_block": True} | EXPERTS), make_mesh(1, 2, 2, expert=2)
    rng = np.random.default_rng(0)
    x, to_route = rng.normal(size=(2, 2, 9, 60)).astype(np.float32)
    sizes = {"router": (60, 6), "gate": (6, 60, 20), "up": (6, 60, 20), "down": (6, 20, 60)}
    params = {name: {"kernel": rng.normal(size=size).astype(np.float32) / 5} for name, size in sizes.items()}
    params["router"]["scale"] = rng.uniform(0.5, 2, 6).astype(np.float32)
    module = Experts(config, mesh, lambda gate, up: jnp.square(gate) * up)
    ours = jax.jit(lambda params: module.apply({"params": params}, x, to_route))(params)
    gate, up, down = (params[name]["kernel"] for name in ("gate", "up", "down"))
    for place in np.ndindex(2, 9):
        odds = np.exp(to_route[place] @ params["router"]["kernel"])
        best = np.argsort(odds)[-2:]
        weights = odds[best] / odds[best].sum() * params["router"]["scale"][best]
        each = [((x[place] @ gate[e]) ** 2 * (x[place] @ up[e])) @ down[e] for e in best]
        np.testing.assert_allclose(ours[place], weights @ each, rtol=0, atol=3e-5 * np.abs(each).max())


def test_new_parameters_have_rows():
    model = Model(from_hf(TEXT))
    params = jax.eval_shape(model.init, jax.random.key(0))
    check_rows_cover(params, model.config)
    layers = params["layers"]
    assert layers["attention"]["key"]["kernel"].shape == (5, 60, 2, 14)
    assert layers["global_attention"]["key"]["kernel"].shape == (2, 60, 3, 22)
    assert "value" not in layers["global_attention"]


@pytest.mark.parametrize("fields", [SMALL, {"enable_moe_block": True} | EXPERTS], ids=["small", "experts"])
def test_tensors_beside_a_vision_model_are_those_of_transformers(fields):
    """By name and shape."""
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
                  num_key_value_heads=2, position_embedding_size=16)  # fmt: skip
    theirs = transformers.Gemma4Config(text_config=TEXT | fields, vision_config=vision)
    with torch.device("meta"):
        state = transformers.Gemma4ForConditionalGeneration(theirs).state_dict()
    config = from_hf(theirs.to_dict())
    shapes = {name: row.hf_shape for row in file_rows(config) for name in row.names(config.num_layers)}
    ours = {config.tensor_prefix + name.removeprefix(config.replaced_prefix): of for name, of in shapes.items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in state.items() if "language_model." in name}


def test_layers_that_use_the_keys_of_others_have_no_cache(checkpoint):
    model = Model(from_hf(hf.read_config(checkpoint("gemma4_small")[1])))
    params = jax.eval_shape(model.init, jax.random.key(0))
    check_rows_cover(params, model.config)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == costs.weights(model.config)
    params = jax.eval_shape(model.for_decoding, params)
    assert [sorted(layer["attention"]) for layer in params["layers"]] == [
        *[["key", "key_norm", "output", "query", "query_norm", "value"]] * 3,
        *[["output", "query", "query_norm"]] * 2,
    ]
    assert [layer["mlp"]["up"]["kernel"].shape for layer in params["layers"]] == [(60, 56)] * 3 + [(60, 112)] * 2
    rows = jax.ShapeDtypeStruct((3, 11), jnp.int32), jax.ShapeDtypeStruct((3,), jnp.int32)
    _, cache = jax.eval_shape(model.prefill, params, *rows)
    assert [keys.shape for keys in cache.keys] == [(3, 2, 11, 14), (3, 2, 11, 14), (3, 2, 11, 22)]


def test_keys_of_layers_that_use_those_of_others_are_ignored_and_exported(checkpoint, tmp_path):
    """Published files have them; transformers ignores them too."""
    source = checkpoint("gemma4_small")[1]
    config, tensors = from_hf(hf.read_config(source)), load_file(source / "model.safetensors")
    unused = {
        "model.layers.3.self_attn.k_proj.weight": np.ones((28, 60), np.float32),
        "model.layers.4.self_attn.v_proj.weight": np.ones((44, 60), np.float32),
        "model.layers.4.self_attn.k_norm.weight": np.ones(22, np.float32),
    }
    save_file(tensors | unused, tmp_path / "model.safetensors")
    assert hf.matching(tmp_path, config).keys() == hf.matching(source, config).keys()
    assert hf.other_tensors(tmp_path, config).keys() == unused.keys()
    save_file(
        tensors | {"model.layers.2.self_attn.k_proj.bias": np.ones(28, np.float32)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"model.layers.2.self_attn.k_proj.bias .* has no place"):
        hf.matching(tmp_path, config)


@pytest.mark.slow
@pytest.mark.parametrize("family, tolerance", [("gemma4", 1e-5), ("gemma4_small", 2e-5)])
def test_a_gradient_is_added_to_an_earlier_one(family, tolerance, checkpoint):
    """Each layer's part to its own entry of a stack, from known inputs of the layers.

    In the second model, gradients in float32 differ from those in float64 by up to 1e-5 on torch too.
    """
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    folder = checkpoint(family)[1]
    config = from_hf(hf.read_config(folder))
    model, params = Model(config, mesh=mesh, remat="dots"), hf.load(folder, config, mesh, "float32")
    tokens = np.random.default_rng(0).integers(3, 98, (2, 17)).astype(np.int32)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 17, 60)), jnp.float32)
    decoding, lengths = jax.jit(model.for_decoding)(params), np.full(2, 17, np.int32)
    residuals = jax.jit(partial(model.prefill, keep_residuals=True))(decoding, tokens, lengths)[1].residuals
    rng = np.random.default_rng(2)
    so_far = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params["layers"])

    def loss(hidden):
        return jnp.sum(weights * jnp.sin(hidden))

    expected = jax.jit(jax.grad(lambda p: loss(model.hidden(p, tokens))))(params)["layers"]
    added = jax.jit(jax.grad(lambda total: loss(model.hidden(params, tokens, total, residuals))))(so_far)
    for ours, before, theirs in zip(*map(jax.tree.leaves, (added, so_far, expected)), strict=True):
        np.testing.assert_allclose(ours - before, theirs, rtol=0, atol=tolerance * float(np.abs(theirs).max()))


def test_products_of_gradients_by_layer():
    """Stacks of different lengths are groups of their own."""
    shapes = {"embedding": (3,), "layers.mlp.up": (3, 2)}
    shapes |= {"layers.attention.key": (2, 5), "layers.global_attention.key": (1, 7)}
    ones = {name: jnp.ones(shape) for name, shape in shapes.items()}
    groups = {name: np.asarray(value).tolist() for name, value in products(ones, ones).items()}
    assert groups == {"embedding": 3, "layers": [2, 2, 2], "attention": [5, 5], "global_attention": [7]}
    shapes = {"layers.input_gate": (3, 2), "layers.mlp.up": (2, 5), "layers.wide_mlp.up": (1, 10)}
    shapes |= {"layers.attention.key": (2, 7), "layers.sharing_attention.query": (1, 11)}
    ones = {name: jnp.ones(shape) for name, shape in shapes.items()}
    groups = {name: np.asarray(value).tolist() for name, value in products(ones, ones).items()}
    assert groups == {
        "layers": [2, 2, 2], "mlp": [5, 5], "wide_mlp": [10], "attention": [7, 7], "sharing_attention": [11]
    }  # fmt: skip
