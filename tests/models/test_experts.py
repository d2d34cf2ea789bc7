"""Mixtures of experts: the router, rows that a mesh does not divide, frozen routers, mistakes in files."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import edit_json
from safetensors.numpy import load_file, save_file

from camopd_jax.config.schema import Sampling
from camopd_jax.errors import UserError
from camopd_jax.models import hf, partition
from camopd_jax.models.config import Routing, from_hf
from camopd_jax.models.experts import route
from camopd_jax.models.shapes import SHAPES
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.rollout import generate
from camopd_jax.rollout.sampling import row_keys
from camopd_jax.rollout.score import score
from camopd_jax.runtime.mesh import global_rows, make_mesh
from camopd_jax.types import Prompts, Sequences

FIELDS = dict(
    model_type="qwen3_moe",
    vocab_size=44,
    hidden_size=24,
    moe_intermediate_size=10,
    intermediate_size=99,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_experts=5,
    num_experts_per_tok=2,
    initializer_range=0.3,
)


@pytest.mark.gpu
@pytest.mark.parametrize(("normalized", "weights"), [(False, [0.5, 0.3]), (True, [0.625, 0.375])])
def test_a_token_goes_to_its_likeliest_experts(normalized, weights):
    """Probabilities of the experts of one token: 0.1, 0.5, 0.1, 0.3."""
    router = jnp.log(jnp.array([[0.1, 0.5, 0.1, 0.3]]))
    got, experts = route(jnp.ones((1, 1)), {"kernel": router}, Routing(experts=4, per_token=2, normalized=normalized))
    assert experts.tolist() == [[1, 3]]
    np.testing.assert_allclose(got, [weights], rtol=1e-6)


@pytest.mark.parametrize("rows", [4, 3])
def test_a_mesh_gives_the_same_numbers(rows):
    """3 rows are not divided over 2 devices: then all devices compute all of them."""
    config = from_hf(FIELDS)
    params = Model(config).init(jax.random.key(1))
    tokens = np.random.default_rng(0).integers(0, 44, (rows, 9)).astype(np.int32)
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    spread = jax.device_put(params, shardings(config, mesh))
    expected = jax.jit(Model(config).hidden)(params, tokens)
    np.testing.assert_allclose(jax.jit(Model(config, mesh=mesh).hidden)(spread, tokens), expected, atol=2e-5)
    kernel = spread["layers"]["mlp"]["down"]["kernel"]
    assert kernel.shape == (2, 5, 10, 24) and kernel.addressable_shards[0].data.shape == (2, 5, 5, 12)


SIX = dict(num_experts=6)
BIASED = dict(model_type="gpt_oss", num_local_experts=6, intermediate_size=10)


@pytest.mark.parametrize("fields", [pytest.param(SIX, id="qwen3_moe"), pytest.param(BIASED, marks=pytest.mark.slow)])
def test_experts_on_several_devices_give_the_same_numbers(fields):
    """Answers, scores and gradients on 8 devices: 2 for the rows, 2 for experts, 2 for their widths."""
    own = {n: v for n, v in FIELDS.items() if fields.get("model_type") != "gpt_oss" or "moe" not in n}
    own.pop("num_experts")
    config = from_hf(own | fields)
    params = Model(config).init(jax.random.key(1))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params)
    mesh = make_mesh(1, 2, 2, expert=2)
    spread = jax.device_put(params, shardings(config, mesh))
    gate = spread["layers"]["mlp"]["gate"]["kernel"]
    assert gate.shape == (2, 6, 24, 10) and gate.addressable_shards[0].data.shape == (2, 3, 12, 5)
    ids = np.random.default_rng(0).integers(0, 44, (2, 15)).astype(np.int32)
    prompts, lengths = Prompts(ids[:, :6], np.array([6, 4], np.int32)), np.full(2, 9, np.int32)
    greedy = generate.Decode(Sampling(temperature=0.0), eos_ids=(), max_new=9)

    def numbers(model, params):
        keys = row_keys(0, jnp.int32(0), jnp.arange(2))
        answers = generate.answers(model, generate.for_decoding(model, params), prompts, keys, greedy)
        rows = Sequences(prompts, ids[:, 6:], lengths)
        rows = rows if model.mesh is None else global_rows(model.mesh, rows, 2)

        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def mean(params):
            log_probs = score(model, params, rows, chunk=4)["log_prob"]
            return jnp.mean(log_probs), log_probs

        (_, log_probs), gradient = mean(params)
        return answers.tokens, answers.log_probs, log_probs, gradient

    expected, got = numbers(Model(config), params), numbers(Model(config, mesh=mesh), spread)
    assert got[0].tolist() == expected[0].tolist()
    for ours, theirs in zip(got[1:3], expected[1:3], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)

    def close(ours, theirs):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)

    jax.tree.map(close, jax.device_get(got[3]), jax.device_get(expected[3]))


def test_experts_must_divide_over_the_mesh():
    mesh = make_mesh(2, 1, 1, expert=4)
    with pytest.raises(UserError, match=r"mesh.expert is 4, which does not divide .* experts = 5; .* be 1, 5$"):
        shardings(from_hf(FIELDS), mesh)
    with pytest.raises(UserError, match=r"mesh.expert is 4, but a model has no experts; give 1"):
        shardings(from_hf(SHAPES["tiny"]), mesh)
    with pytest.raises(UserError, match="mesh data 2 x fsdp 1 x expert 3 x tensor 1 needs 6 devices, not 8"):
        make_mesh(2, 1, 1, expert=3)


def test_routers_are_frozen_unless_a_pattern_matches_them():
    params = Model(from_hf(FIELDS)).init(jax.random.key(1))
    assert set(params["layers"]["mlp"]) == {"router", "gate", "up", "down"}
    by_default = partition.trained(params, "all")
    assert set(by_default["layers"]["mlp"]) == {"gate", "up", "down"}
    assert len(jax.tree.leaves(by_default)) == len(jax.tree.leaves(params)) - 1
    assert jax.tree.structure(partition.trained(params, ".")) == jax.tree.structure(params)
    assert partition.frozen_routers(from_hf(FIELDS), "all")
    assert not partition.frozen_routers(from_hf(FIELDS), ".")
    assert not partition.frozen_routers(from_hf(SHAPES["tiny"]), "all")


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint("qwen3_moe")[1], tmp_path / "model")


def refused(folder, message):
    config = from_hf(hf.read_config(folder), where=str(folder / "config.json"))
    with pytest.raises(UserError, match=message):
        hf.load(folder, config, make_mesh(1, devices=jax.devices()[:1]), "float32")


def test_mistakes_of_an_expert_are_named(folder):
    good = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    save_file(good | {name: np.full_like(good[name], np.nan)}, folder / "model.safetensors")
    refused(folder, f"tensor {name} has values that are not finite")
    save_file({n: t for n, t in good.items() if n != name}, folder / "model.safetensors")
    refused(folder, f"tensor {name} is missing")


def test_mistakes_of_the_config_are_named(folder):
    for changes, message in [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6; num_experts is only 5"),
        ({"num_local_experts": 0}, "field num_experts is 0; give an integer > 0"),
        ({"decoder_sparse_step": 2}, "field decoder_sparse_step is 2; qwen3_moe supports only 1"),
        ({"mlp_only_layers": [1]}, r"field mlp_only_layers = \[1\] is not known"),
        (
            {"model_type": "olmoe", "clip_qkv": 8.0, "decoder_sparse_step": None, "moe_intermediate_size": None},
            "field clip_qkv = 8.0 is not known",
        ),
    ]:
        good = (folder / "config.json").read_text()
        edit_json(folder / "config.json", **changes)
        with pytest.raises(UserError, match=f"config.json: {message}"):
            from_hf(hf.read_config(folder))
        (folder / "config.json").write_text(good)
