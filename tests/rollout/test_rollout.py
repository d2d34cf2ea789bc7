"""Rollouts against a loop of full forward passes, and independence of a row from its batch."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.config.schema import RolloutConfig, Sampling
from camopd_jax.models.weights import shardings
from camopd_jax.rollout import decode, generate
from camopd_jax.rollout.generate import Decode
from camopd_jax.rollout.sampling import Exploration, row_keys, sample, sample_rows, sampling_of
from camopd_jax.rollout.score import score
from camopd_jax.runtime.mesh import make_mesh, reshape_mesh
from camopd_jax.types import Prompts

GREEDY = Sampling(temperature=0.0)
MAX_NEW = 9


def run(tiny, prompts, index=None, sampling=Sampling(), eos_ids=(2,), max_new=MAX_NEW, model=None, **options):
    """One rollout; `index` determines each row's key."""
    index = jnp.arange(len(prompts.lengths)) if index is None else jnp.asarray(index)
    keys = row_keys(0, jnp.int32(1), index)
    model = model or tiny[0]
    params = generate.for_decoding(model, tiny[1])
    return generate.answers(model, params, prompts, keys, Decode(sampling, eos_ids, max_new, **options))


def test_weights_are_moved_to_another_mesh(tiny):
    """From mesh 4 x 2 x 1 to 4 x 1 x 2 and 8 x 1 x 1: equal values, with the shardings of the table of weights."""
    learns = make_mesh(1, 4, 2)
    spread = jax.device_put(tiny[1], shardings(tiny[0].config, learns))
    expected = tiny[0].for_decoding(tiny[1])
    for tensor in (1, 2):
        model = tiny[0].on(reshape_mesh(learns, -1, 1, tensor, "config.rollout.mesh"))
        moved = generate.for_decoding(model, spread)
        jax.tree.map(np.testing.assert_array_equal, moved, expected)
        kernel = moved["layers"][0]["mlp"]["gate"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (12, 20 // tensor)


@pytest.mark.parametrize("mesh", [None, "of one device"])
def test_weights_that_need_no_move_are_not_copied(tiny, mesh):
    """Also on a mesh of one device. If an update donates a stacked array, its views do not change."""
    mesh = mesh and make_mesh(1, devices=jax.devices()[:1])
    whole_cache_lines = dict.fromkeys(("hidden_size", "intermediate_size"), 64)
    config = dataclasses.replace(tiny[0].config, **whole_cache_lines)
    model = dataclasses.replace(tiny[0], config=config, mesh=mesh)
    params = model.init(jax.random.key(0))
    if mesh is not None:
        params = jax.device_put(params, shardings(model.config, mesh))
    expected = jax.tree.map(np.array, model.for_decoding(params))
    views = generate.for_decoding(model, params)
    stack, layers = params["layers"]["mlp"]["gate"]["kernel"], [p["mlp"]["gate"]["kernel"] for p in views["layers"]]
    start, size = stack.unsafe_buffer_pointer(), layers[0].nbytes
    assert [layer.unsafe_buffer_pointer() for layer in layers] == [start + i * size for i in range(len(layers))]
    cast = generate.for_decoding(dataclasses.replace(model, dtype="bfloat16"), params)
    assert cast["layers"][0]["mlp"]["gate"]["kernel"].dtype == jnp.bfloat16
    jax.block_until_ready(jax.jit(partial(jax.tree.map, lambda p: p + 1), donate_argnums=0)(params))
    jax.tree.map(np.testing.assert_array_equal, views, expected)


def test_greedy_equals_a_loop_of_full_forwards(tiny, batch):
    model, params = tiny
    prompts = batch[0]
    out = run(tiny, prompts, sampling=GREEDY)
    hidden = jax.jit(model.hidden)
    for row, length in enumerate(np.asarray(prompts.lengths)):
        ids = np.asarray(prompts.tokens)[row, :length].tolist()
        for t in range(MAX_NEW):
            padded = np.array([ids + [0] * (20 - len(ids))])
            logits = np.asarray(model.logits(params, hidden(params, padded)[0, len(ids) - 1]), np.float64)
            logp = logits - np.log(np.exp(logits).sum())
            assert out.tokens[row, t] == logits.argmax()
            np.testing.assert_allclose(out.log_probs[row, t], logp.max(), atol=1e-5)
            ids.append(int(logits.argmax()))
            if ids[-1] == 2:
                break
        assert out.lengths[row] == t + 1
        assert out.stopped[row] == (ids[-1] == 2)
        np.testing.assert_array_equal(out.log_probs[row, t + 1 :], 0)
    assert 0 < int(jnp.sum(out.stopped)) < len(prompts.lengths), "the case should hold both kinds of ending"


def test_a_row_depends_only_on_its_prompt_and_key(tiny, batch):
    prompts = batch[0]
    whole = run(tiny, prompts)
    order = np.array([6, 1, 4])
    wider = jnp.pad(prompts.tokens[order], ((0, 0), (0, 3)), constant_values=7)  # other batch, order and padding
    part = run(tiny, Prompts(wider, prompts.lengths[order]), index=order)
    np.testing.assert_array_equal(part.tokens, whole.tokens[order])
    np.testing.assert_array_equal(part.lengths, whole.lengths[order])
    np.testing.assert_allclose(part.log_probs, whole.log_probs[order], atol=1e-5)
    assert not np.array_equal(run(tiny, prompts, index=np.arange(8) + 100).tokens, whole.tokens)


def test_a_mesh_changes_nothing(tiny, batch):
    whole = run(tiny, batch[0])
    for shape in ((8, 1, 1), (2, 2, 2)):
        model = dataclasses.replace(tiny[0], mesh=make_mesh(*shape))
        np.testing.assert_array_equal(run(tiny, batch[0], model=model).tokens, whole.tokens)


def test_logprobs_from_sampling_are_unfiltered(tiny, batch):
    model, params = tiny
    prompts = batch[0]
    for sampling in (Sampling(), Sampling(temperature=0.7, top_k=4), Sampling(top_p=0.8, min_p=0.05)):
        out = run(tiny, prompts, sampling=sampling)
        again = score(model, params, out.after(prompts), chunk=16)["log_prob"]
        np.testing.assert_allclose(out.log_probs, again, atol=1e-5)


def test_entropy_is_the_mean_over_the_answer(tiny, batch):
    model, params = tiny
    prompts = batch[0]
    out = run(tiny, prompts)
    ids = np.concatenate([np.asarray(prompts.tokens)[3, : int(prompts.lengths[3])], np.asarray(out.tokens)[3]])
    logp = jax.nn.log_softmax(model.logits(params, model.hidden(params, ids[None].astype(np.int32))[0]), axis=-1)
    entropy = -np.sum(np.exp(logp) * logp, axis=-1)
    first = int(prompts.lengths[3]) - 1
    np.testing.assert_allclose(out.entropy[3], entropy[first : first + int(out.lengths[3])].mean(), rtol=1e-4)


def test_without_eos_every_answer_is_full(tiny, batch):
    out = run(tiny, batch[0], eos_ids=())
    np.testing.assert_array_equal(out.lengths, MAX_NEW)
    assert not out.stopped.any()


def test_any_of_several_eos_ends_a_row(tiny, batch):
    out = run(tiny, batch[0], eos_ids=(2, 5, 9))
    for row in range(8):
        answer = np.asarray(out.tokens)[row, : int(out.lengths[row])]
        assert not np.isin(answer[:-1], (2, 5, 9)).any()
        assert np.isin(answer[-1], (2, 5, 9)) == out.stopped[row]


def test_sampling_stops_when_all_rows_are_finished(tiny, batch):
    """All rows end at once, with a maximum length that would take too long; the turns are counted."""
    out = run(tiny, batch[0], eos_ids=tuple(range(14)), max_new=100_000)
    np.testing.assert_array_equal(out.lengths, 1)


@pytest.mark.parametrize("segment", [1, 3, 4])
def test_a_growing_cache_has_no_effect(tiny, batch, segment, monkeypatch):
    whole = run(tiny, batch[0], max_new=11)
    monkeypatch.setattr(generate, "FIRST_RING", segment)
    grown = run(tiny, batch[0], max_new=11)
    np.testing.assert_array_equal(grown.tokens, whole.tokens)
    np.testing.assert_allclose(grown.log_probs, whole.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    "options, segment", [({"concurrency": 3}, 2), ({"shrinks": True}, 256), ({"concurrency": 4, "shrinks": True}, 2)]
)
def test_waiting_prompts_and_shrinking_batches_change_no_answer(tiny, batch, options, segment, monkeypatch):
    """Waiting prompts start in lanes of finished answers, and the ring wraps around while others continue."""
    kinds = {"eos_ids": (2, 5, 9), "max_new": 11}
    whole = run(tiny, batch[0], **kinds)
    assert len(set(np.asarray(whole.lengths).tolist())) > 3, "the case should hold answers of many lengths"
    monkeypatch.setattr(generate, "FIRST_RING", segment)
    other = run(tiny, batch[0], **kinds, **options)
    for name in ("tokens", "lengths", "stopped"):
        np.testing.assert_array_equal(getattr(other, name), getattr(whole, name))
    np.testing.assert_allclose(other.log_probs, whole.log_probs, atol=1e-5)
    np.testing.assert_allclose(other.entropy, whole.entropy, atol=1e-5)


def test_waiting_prompts_on_a_mesh(tiny, batch):
    whole = run(tiny, batch[0])
    model = dataclasses.replace(tiny[0], mesh=make_mesh(2, 1, 2, devices=jax.devices()[:4]))
    other = run(tiny, batch[0], model=model, concurrency=4, shrinks=True)
    np.testing.assert_array_equal(other.tokens, whole.tokens)
    np.testing.assert_array_equal(other.stopped, whole.stopped)


# ------------------------------------------------------------------------- several answers to a prompt


def several(tiny, prompts, answers, shared=True, model=None, sampling=Sampling(), **options):
    """A rollout with this many answers to each prompt; unless `shared`, every row is prefilled."""
    rows = jax.tree.map(lambda array: jnp.repeat(array, answers, axis=0), prompts)
    keys = row_keys(0, jnp.int32(1), jnp.repeat(jnp.arange(len(prompts.lengths)), answers), answers)
    how = Decode(sampling, (2, 5, 9), MAX_NEW, answers_per_prompt=answers if shared else 1, **options)
    model = model or tiny[0]
    return generate.answers(model, generate.for_decoding(model, tiny[1]), rows, keys, how)


def assert_same_answers(ours, theirs):
    for name in ("tokens", "lengths", "stopped"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-5)


def test_a_shared_prefill_changes_no_answer(tiny, batch):
    """Equal to a prefill of every row; the first answer to each prompt is that of a run with one answer."""
    alone, three = run(tiny, batch[0], eos_ids=(2, 5, 9)), several(tiny, batch[0], 3)
    assert_same_answers(three, several(tiny, batch[0], 3, shared=False))
    np.testing.assert_array_equal(three.tokens[::3], alone.tokens)
    rows = np.asarray(three.tokens).reshape(8, 3, MAX_NEW)
    assert sum(len(np.unique(row, axis=0)) == 3 for row in rows) > 4, "the answers to a prompt differ"


@pytest.mark.parametrize(
    "options",
    [{"concurrency": 6, "shrinks": True}, pytest.param({"keep_residuals": True}, marks=pytest.mark.slow)],
)
def test_a_shared_prefill_with_waiting_prompts_or_kept_residuals(tiny, batch, options):
    """Prompts enter with all their answers; the residual stream is that of a prefill of every row."""
    ours = several(tiny, batch[0], 3, **options)
    theirs = several(tiny, batch[0], 3, shared=False, keep_residuals="keep_residuals" in options)
    assert_same_answers(ours, theirs)
    for one, other in zip(ours.residuals, theirs.residuals, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_a_shared_prefill_on_a_mesh(tiny, batch):
    model = dataclasses.replace(tiny[0], mesh=make_mesh(2, 2, 2))
    assert_same_answers(several(tiny, batch[0], 3, model=model, concurrency=12), several(tiny, batch[0], 3))


def test_the_prompts_alone_are_prefilled(tiny, batch, monkeypatch):
    """Of 24 rows with 3 answers to each of 8 prompts, the model reads 8."""
    sizes, prefill = [], type(tiny[0]).prefill

    def noted(model, params, tokens, *rest):
        sizes.append(tokens.shape[0])
        return prefill(model, params, tokens, *rest)

    monkeypatch.setattr(type(tiny[0]), "prefill", noted)
    rows = jax.tree.map(lambda array: jnp.repeat(array, 3, axis=0), batch[0])
    options = {"sampling": GREEDY, "eos_ids": (2,), "max_new": MAX_NEW, "answers_per_prompt": 3}
    begin = partial(decode.begin, tiny[0], **options)
    keys = row_keys(0, jnp.int32(1), jnp.arange(24), 3)
    state = jax.eval_shape(begin, tiny[0].for_decoding(tiny[1]), rows, keys, jnp.arange(24))
    assert sizes == [8]
    assert state.cache.positions.shape[0] == state.tokens.shape[0] == 24


@pytest.mark.slow
def test_explorations_are_sampled_in_their_own_way(tiny, batch):
    """The first answer to each prompt as without explorations, the others as if every row were one."""
    settings = RolloutConfig(answers_per_prompt=3, exploration=(1.7, 0.6))
    mixed, plain, wide = (
        np.asarray(several(tiny, batch[0], 3, sampling=sampling).tokens).reshape(8, 3, MAX_NEW)
        for sampling in (sampling_of(settings), Sampling(), Sampling(temperature=1.7, top_p=0.6))
    )
    np.testing.assert_array_equal(mixed[:, 0], plain[:, 0])
    np.testing.assert_array_equal(mixed[:, 1:], wide[:, 1:])
    assert (plain[:, 0] != wide[:, 0]).any() and (plain[:, 1:] != wide[:, 1:]).any()


def test_the_rows_of_explorations():
    """Row numbers, not lanes, decide: of rows 2, 1, 4 and 7 with 2 answers to a prompt, 1 and 7 are explorations."""
    sampling = Exploration(temperature=1.0, top_k=1, others=Sampling(temperature=1.0), answers=2)
    logits, keys = jnp.tile(jnp.arange(5.0) / 10, (4, 1)), row_keys(0, jnp.int32(0), jnp.arange(4))
    tokens = sample_rows(logits, keys, sampling, jnp.array([2, 1, 4, 7]))
    free = sample(logits, keys, sampling.others)
    np.testing.assert_array_equal(tokens, [4, free[1], 4, free[3]])
    assert {int(free[1]), int(free[3])} != {4}
    assert sampling_of(RolloutConfig(answers_per_prompt=2)) == Sampling()


def test_keys_of_several_answers():
    """Different for every prompt and answer, those of answer 0 as with one answer, and independent of the batch."""
    index = jnp.array([5, 5, 5, 9, 9, 9])
    keys = jax.random.key_data(row_keys(1, jnp.int32(2), index, 3))
    assert len(np.unique(keys, axis=0)) == 6
    np.testing.assert_array_equal(keys[::3], jax.random.key_data(row_keys(1, jnp.int32(2), jnp.array([5, 9]))))
    np.testing.assert_array_equal(keys[3:], jax.random.key_data(row_keys(1, jnp.int32(2), index[3:], 3)))
