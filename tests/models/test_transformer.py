"""Models against transformers on torch, and against the same models with caches, padding and meshes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scoring import log_probs, torch_log_probs

from camopd_jax.config.schema import Sampling
from camopd_jax.models import families, hf
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import leaf_of, table
from camopd_jax.rollout import generate
from camopd_jax.rollout.generate import Decode
from camopd_jax.rollout.sampling import row_keys
from camopd_jax.rollout.score import score
from camopd_jax.runtime.mesh import global_rows, make_mesh
from camopd_jax.types import EMPTY, KVCache, Prompts, Sequences

LENGTH = 23
GREEDY = Decode(Sampling(temperature=0.0), eos_ids=(), max_new=9)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, 98, (2, LENGTH)).astype(np.int32)


def load(folder, mesh, dtype="float32", **fields):
    config = from_hf(hf.read_config(folder), context=LENGTH)
    return Model(config, mesh=mesh, dtype=dtype, **fields), hf.load(folder, config, mesh, dtype)


def gradients(torch_model) -> dict:
    """The gradient of each tensor, by its name in safetensors. transformers stacks experts, and saves each alone."""
    by_name = {name: np.zeros(constant.shape) for name, constant in torch_model.named_buffers()}  # Gemma 4's scalars
    for name, parameter in torch_model.named_parameters():
        grad = parameter.grad.numpy()
        by_name[name] = grad  # of gpt-oss's experts too
        if "experts" not in name:
            by_name[name.replace("mlp.gate.", "block_sparse_moe.gate.")] = grad  # Mixtral's
            continue
        parts = (
            dict(zip(("gate", "up"), np.split(grad, 2, axis=1), strict=True)) if "gate_up" in name else {"down": grad}
        )
        prefix = name.rsplit("mlp.", 1)[0]
        for part, stacked in parts.items():
            old = {"gate": "w1", "up": "w3", "down": "w2"}[part]
            for e, one in enumerate(stacked):
                by_name[f"{prefix}mlp.experts.{e}.{part}_proj.weight"] = one
                by_name[f"{prefix}block_sparse_moe.experts.{e}.{old}.weight"] = one
    return by_name


def test_float32_logprobs_equal_transformers(family, checkpoint, mesh, tokens):
    torch_model, folder = checkpoint(family)
    model, params = load(folder, mesh)
    np.testing.assert_allclose(
        log_probs(model, params, tokens), torch_log_probs(torch_model, tokens), atol=2e-5, rtol=0
    )


def test_greedy_answers_equal_transformers(family_or_slow, checkpoint, mesh, tokens):
    """Token for token, with their log-probabilities. Prompts of unequal length, whose padding is arbitrary."""
    torch_model, folder = checkpoint(family_or_slow)
    model, params = load(folder, mesh)
    lengths = np.array([11, 7], np.int32)
    prompts = Prompts(np.where(np.arange(13) < lengths[:, None], tokens[:, :13], 97).astype(np.int32), lengths)
    keys = row_keys(0, jnp.int32(0), jnp.arange(2))
    answers = generate.answers(model, generate.for_decoding(model, params), prompts, keys, GREEDY)
    ids = np.where(np.arange(LENGTH) < lengths[:, None], tokens, 0)
    for t in range(GREEDY.max_new):  # each token from whole rows, without a cache
        with torch.no_grad():
            likeliest = torch_model(torch.tensor(ids, dtype=torch.long)).logits.argmax(-1).numpy()
        ids[[0, 1], lengths + t] = likeliest[[0, 1], lengths + t - 1]
    expected = torch_log_probs(torch_model, ids)
    for row, length in enumerate(lengths):
        end = length + GREEDY.max_new
        assert answers.tokens[row].tolist() == ids[row, length:end].tolist()
        np.testing.assert_allclose(answers.log_probs[row], expected[row, length - 1 : end - 1], atol=2e-5, rtol=0)


def test_scores_and_gradients_on_a_mesh_equal_transformers(family_or_slow, checkpoint, tokens):
    """Two devices for the rows, two for heads and vocabulary where the heads divide; logits of a few tokens at a time.

    Each gradient is within 2e-5 of the largest number of its tensor.
    """
    torch_model, folder = checkpoint(family_or_slow)
    shards = 2 if family_or_slow != "smollm2" else 1  # which has nine heads
    model, params = load(folder, make_mesh(1, 2, shards, devices=jax.devices()[: 2 * shards]))
    lengths = np.array([9, 5], np.int32)  # of the prompts; of the answers the rest, and as many tokens
    answer = LENGTH - lengths.max()
    rows = Sequences(
        Prompts(np.where(np.arange(9) < lengths[:, None], tokens[:, :9], 97).astype(np.int32), lengths),
        np.stack([row[length : length + answer] for row, length in zip(tokens, lengths, strict=True)]),
        np.full(2, answer, np.int32),
    )

    @partial(jax.value_and_grad, has_aux=True)
    def mean(params, rows):
        log_probs_BT = score(model, params, rows, chunk=4)["log_prob"]
        return jnp.mean(log_probs_BT), log_probs_BT

    (_, log_probs_BT), gradient = jax.jit(mean)(params, global_rows(model.mesh, rows, 2))
    torch_model.zero_grad()
    logp = torch.log_softmax(torch_model(torch.tensor(tokens, dtype=torch.long)).logits, -1)
    answers = zip(logp, lengths, rows.tokens.tolist(), strict=True)
    expected = torch.stack([row[range(n - 1, n - 1 + answer), ids] for row, n, ids in answers])
    np.testing.assert_allclose(log_probs_BT, expected.detach(), atol=2e-5, rtol=0)
    expected.mean().backward()
    tensors, layers = gradients(torch_model), model.config.num_layers
    for row in table(model.config):
        ours = np.asarray(leaf_of(gradient, row.path))
        for place, name in zip(np.ndindex(row.stack(layers)), row.names(layers), strict=True):
            theirs, same = row.part_of(tensors[name]), row.to_hf(ours[place])
            np.testing.assert_allclose(same, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0, err_msg=name)


def test_a_new_family_needs_one_row(checkpoint, mesh, tokens, monkeypatch):
    """VaultGemma: Gemma 2 without norms after attention and feed-forward."""
    row = dataclasses.replace(families.FAMILIES["gemma2"], post_norms=False)
    monkeypatch.setitem(families.FAMILIES, "vaultgemma", row)
    torch_model, folder = checkpoint("vaultgemma")
    model, params = load(folder, mesh)
    np.testing.assert_allclose(
        log_probs(model, params, tokens), torch_log_probs(torch_model, tokens), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", pytest.param("gemma4", marks=pytest.mark.slow)])
def test_bfloat16_logprobs_are_as_accurate_as_transformers(family, checkpoint, mesh, tokens):
    """bfloat16 has 8 bits of precision: the error is at most twice that of torch in bfloat16."""
    torch_model, folder = checkpoint(family)
    truth = torch_log_probs(torch_model, tokens)
    rounded = type(torch_model).from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    model, params = load(folder, mesh, "bfloat16")
    our_error = np.abs(log_probs(model, params, tokens) - truth).mean()
    assert our_error < 2 * np.abs(torch_log_probs(rounded, tokens) - truth).mean()
    assert our_error < 0.05


@pytest.mark.parametrize("family", ["gemma3"])
def test_prefill_and_decode_equal_the_full_forward(family, checkpoint, mesh, tokens):
    _, folder = checkpoint(family)
    model, params = load(folder, mesh)
    full = np.asarray(jax.jit(model.hidden)(params, tokens))
    lengths = np.array([11, 7], np.int32)  # rows of unequal length: decode slots are common, positions are not
    prompt = np.where(np.arange(13) < lengths[:, None], tokens[:, :13], 97)  # padding has arbitrary values
    apart = jax.jit(model.for_decoding)(params)
    hidden, cache = jax.jit(model.prefill)(apart, prompt, lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[row, :length], full[row, :length], atol=2e-5)

    def room(array):
        return jnp.pad(array, ((0, 0), (0, 0), (0, 9), (0, 0)))

    positions = jnp.pad(cache.positions, ((0, 0), (0, 9)), constant_values=EMPTY)
    cache = KVCache(tuple(map(room, cache.keys)), tuple(map(room, cache.values)), positions)
    decode = jax.jit(model.decode)
    for turn in range(9):
        position = lengths + turn
        hidden, cache = decode(apart, tokens[[0, 1], position], position, cache, jnp.int32(13 + turn))
        np.testing.assert_allclose(hidden, full[[0, 1], position], atol=2e-5)


def test_decoding_casts_all_parameters_except_norms(checkpoint, mesh):
    _, folder = checkpoint("qwen3")
    model, params = load(folder, mesh)
    apart = dataclasses.replace(model, dtype="bfloat16").for_decoding(params)
    assert len(apart["layers"]) == 3
    for path, leaf in jax.tree_util.tree_leaves_with_path(apart):
        assert leaf.dtype == (jnp.float32 if path[-1].key == "scale" else jnp.bfloat16)


def test_padding_and_other_rows_have_no_effect(checkpoint, mesh, tokens):
    _, folder = checkpoint("qwen3")
    model, params = load(folder, mesh)
    hidden = jax.jit(model.hidden)
    alone = np.asarray(hidden(params, tokens[:1, :9]))
    padded = np.concatenate([tokens[:, :9], np.full((2, 14), 5, np.int32)], axis=1)
    np.testing.assert_allclose(hidden(params, padded)[:1, :9], alone, atol=1e-5)


def test_attention_of_long_sequences_in_chunks(checkpoint, mesh, tokens, monkeypatch):
    _, folder = checkpoint("gemma2")
    model, params = load(folder, mesh)

    def mean_and_gradient():
        return jax.jit(jax.value_and_grad(lambda p: jnp.mean(jnp.square(model.hidden(p, tokens)))))(params)

    value, gradient = mean_and_gradient()
    monkeypatch.setattr("camopd_jax.models.attention._MAX_SCORES", 2 * 6 * LENGTH * 5)  # five queries at a time
    pieces_value, pieces_gradient = mean_and_gradient()
    np.testing.assert_allclose(pieces_value, value, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), pieces_gradient, gradient)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def plain_gradient(request, checkpoint, mesh, tokens):
    """(folder, loss, gradient without remat). The layers of gemma3 have two windows and two RoPEs."""
    folder = checkpoint(request.param)[1]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(*tokens.shape, 60)), jnp.float32)

    def loss(hidden):
        return jnp.sum(weights * jnp.sin(hidden))

    model, params = load(folder, mesh, remat="none")
    return folder, loss, jax.jit(jax.grad(lambda p: loss(model.hidden(p, tokens))))(params)


def same_gradient(gradient, expected):
    """Each array is equal up to 1e-5 of its largest value."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(np.abs(b).max())), gradient, expected
    )


@pytest.mark.parametrize("remat", ["dots", "block"])
def test_remat_has_no_effect_on_gradients(remat, plain_gradient, mesh, tokens):
    folder, loss, expected = plain_gradient
    model, params = load(folder, mesh, remat=remat)
    same_gradient(jax.jit(jax.grad(lambda p: loss(model.hidden(p, tokens))))(params), expected)


@pytest.mark.parametrize("remat", ["none", "dots", "block", "rollout"])
def test_a_gradient_is_added_to_an_earlier_one(remat, plain_gradient, mesh, tokens):
    """It is the same if the residual stream of a prefill replaces the forward pass."""
    folder, loss, expected = plain_gradient
    model, params = load(folder, mesh, remat=remat)
    residuals = ()
    if remat == "rollout":
        lengths = np.full(len(tokens), LENGTH, np.int32)
        decoding = jax.jit(model.for_decoding)(params)
        residuals = jax.jit(partial(model.prefill, keep_residuals=True))(decoding, tokens, lengths)[1].residuals
    rng = np.random.default_rng(2)
    so_far = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params["layers"])

    @jax.jit
    @jax.grad
    def gradient(so_far):
        return loss(model.hidden(params, tokens, so_far, residuals))

    added = jax.tree.map(jnp.subtract, gradient(so_far), so_far)
    same_gradient(added, expected["layers"])


def test_logits_are_cut_to_the_shared_vocabulary(checkpoint, mesh, tokens):
    _, folder = checkpoint("smollm2")
    config = from_hf(hf.read_config(folder))
    params = hf.load(folder, config, mesh, "float32")
    hidden = Model(config, mesh=mesh).hidden(params, tokens)
    full = Model(config, mesh=mesh).logits(params, hidden)
    cut = Model(dataclasses.replace(config, output_vocab_size=89), mesh=mesh).logits(params, hidden)
    assert cut.shape == (2, LENGTH, 89)
    np.testing.assert_allclose(cut, full[..., :89], atol=1e-5)


def test_a_mesh_changes_nothing(checkpoint, mesh, tokens):
    _, folder = checkpoint("llama")
    model, params = load(folder, mesh)
    eight = make_mesh(data=2, fsdp=2, tensor=2)
    sharded_model, sharded_params = load(folder, eight)
    rows = np.concatenate([tokens, tokens[::-1]])
    np.testing.assert_allclose(
        jax.jit(sharded_model.hidden)(sharded_params, rows), jax.jit(model.hidden)(params, rows), atol=2e-5
    )
    kernel = sharded_params["layers"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 30, 3, 14)
