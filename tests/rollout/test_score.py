"""Scoring against a direct softmax, and the sizes of its arrays."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from camopd_jax.method.gradient import GradientAccumulator, Loss, LossInputs, MicroBatchRows, zero_gradient
from camopd_jax.method.objectives import OBJECTIVES, StudentReading
from camopd_jax.method.tokens import Tokens
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import shardings
from camopd_jax.planning.hlo import COLLECTIVES, Module
from camopd_jax.rollout import head
from camopd_jax.rollout.head import TokenFunction, map_tokens
from camopd_jax.rollout.score import LOG_PROB, LogProb, empty_record, join, score, scoring
from camopd_jax.runtime.buckets import Widths
from camopd_jax.runtime.mesh import make_mesh, sharding
from camopd_jax.types import LogProbs, Prompts, Sequences, TeacherRecord


def direct(model, params, prompts, rollout, temperature=1.0):
    """Log-probabilities from full logits, one row at a time."""
    out = np.zeros(rollout.tokens.shape, np.float64)
    for row in range(len(rollout.lengths)):
        p, t = int(prompts.lengths[row]), int(rollout.lengths[row])
        ids = np.concatenate([np.asarray(prompts.tokens)[row, :p], np.asarray(rollout.tokens)[row, :t]])
        logits = np.asarray(model.logits(params, model.hidden(params, ids[None].astype(np.int32))), np.float64)[0]
        logp = logits / temperature - np.log(np.exp(logits / temperature).sum(-1, keepdims=True))
        out[row, :t] = logp[np.arange(p - 1, p + t - 1), ids[p:]]
    return out


@pytest.mark.parametrize("chunk", [1, 8, 24, 10_000])
def test_score_equals_a_full_softmax(tiny, batch, chunk):
    model, params = tiny
    prompts, rollout, _ = batch
    got = jax.jit(score, static_argnums=(0, 3))(model, params, rollout.after(prompts), chunk)["log_prob"]
    np.testing.assert_allclose(got, direct(model, params, prompts, rollout), atol=1e-5)


def test_temperature_divides_the_logits(tiny, batch):
    model, params = tiny
    prompts, rollout, _ = batch
    got = score(model, params, rollout.after(prompts), 64, LogProb(temperature=0.6))["log_prob"]
    np.testing.assert_allclose(got, direct(model, params, prompts, rollout, 0.6), atol=1e-5)


def token_log_probs(model, params, hidden, tokens, chunk):
    return map_tokens(TokenFunction(model, LOG_PROB), params, hidden, {"tokens": tokens}, chunk)["log_prob"]


@pytest.mark.parametrize(("slots", "at_once", "chunks", "size"), [(7, 5, 2, 4), (512, 55, 10, 52), (512, 64, 8, 64)])
def test_chunks_have_one_size_with_little_padding(tiny, slots, at_once, chunks, size):
    """Rows of two; `at_once` slots of each would be allowed."""
    model, params = tiny
    hidden, tokens = jnp.zeros((2, slots, 12)), jnp.zeros((2, slots), jnp.int32)
    traced = jax.make_jaxpr(partial(token_log_probs, model, params, chunk=2 * at_once))(hidden, tokens)
    assert f"f32[{chunks},2,{size}]" in str(traced) and chunks * size - slots < chunks


def test_join_has_no_gap():
    prompts = Prompts(jnp.array([[1, 2, 99], [3, 98, 97]]), jnp.array([2, 1]))
    joined = join(prompts, jnp.array([[4, 5], [6, 7]]))
    np.testing.assert_array_equal(joined, [[1, 2, 4, 5, 0], [3, 6, 7, 0, 0]])


def array_sizes(jaxpr) -> set[int]:
    """Numbers of elements of all arrays in a jaxpr, including nested ones."""
    sizes = set()
    for equation in jaxpr.eqns:
        sizes |= {int(np.prod(v.aval.shape)) for v in equation.outvars if hasattr(v.aval, "shape")}
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes |= array_sizes(inner)
    return sizes


def test_no_array_of_all_logits_forward_or_backward(tiny):
    """With B = 4, T = 50, V = 14 and chunks of 8 tokens, the largest logits array has 4 x 2 x 14 = 112 elements."""
    model, params = tiny
    hidden, tokens = jnp.ones((4, 50, 12)), jnp.ones((4, 50), jnp.int32)

    def loss(params, hidden):
        return jnp.sum(token_log_probs(model, params, hidden, tokens, chunk=8))

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(params, hidden).jaxpr
    sizes = array_sizes(jaxpr)
    assert 4 * 2 * 14 in sizes, "the walk should see the chunk's logits"
    assert 4 * 50 * 14 not in sizes and 4 * 52 * 14 not in sizes
    assert max(sizes) <= 4 * 52 * 12  # the hidden states themselves, padded to whole chunks


def loops(module):
    """{name of a loop: the instructions of its body, including nested ones} of a compiled module."""

    def inside(name):
        for i in module.computations[name].values():
            yield i
            for part in i.called:
                yield from inside(part)

    whiles = (i for i in module.instructions() if i.opcode == "while")
    return {i.name: list(inside(i.attribute("body"))) for i in whiles}


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (1, 2, 4), (8, 1, 1)])
def test_chunks_on_a_mesh_gather_the_head_once_and_reduce_its_gradient_once(sizes):
    """A chip has logits of 8 tokens of its own rows at a time, and only tokens are communicated between chunks."""
    config = from_hf(dict(model_type="qwen3", vocab_size=44, hidden_size=24, intermediate_size=20,
                          num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, head_dim=6,
                          tie_word_embeddings=sizes[0] == 2, initializer_range=0.6))  # fmt: skip
    mesh = make_mesh(*sizes)
    alone, model = Model(config), Model(config, mesh=mesh)
    params = alone.init(jax.random.key(3))
    rng = np.random.default_rng(0)
    hidden, tokens = rng.normal(size=(8, 29, 24)).astype(np.float32), rng.integers(0, 44, (8, 29)).astype(np.int32)
    weights = rng.normal(size=(8, 29)).astype(np.float32)

    def loss(model, chunk, params, hidden):
        return jnp.sum(weights * token_log_probs(model, params, hidden, tokens, chunk))

    def gradient(model, chunk):
        return jax.jit(jax.value_and_grad(partial(loss, model, chunk), argnums=(0, 1)))

    value, expected = gradient(alone, 10_000)(params, hidden)
    spread = jax.device_put(params, shardings(config, mesh)), jax.device_put(hidden, sharding(mesh, "batch"))
    emitters = {"xla_cpu_use_fusion_emitters": True}  # without them a scatter is a loop too
    compiled = gradient(model, 8).lower(*spread).compile(compiler_options=emitters)
    got_value, got = compiled(*spread)
    np.testing.assert_allclose(got_value, value, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), got, expected)

    text, shards = compiled.as_text(), sizes[0] * sizes[1]
    trips = -(-29 // (8 // (8 // shards)))
    assert re.findall(r'"known_trip_count":{"n":"(\d+)"', text) == [str(trips)] * 2, "there and back"
    bodies = loops(Module(text))
    moved = [dims for body in bodies.values() for i in body if i.opcode in COLLECTIVES for _, dims in i.arrays]
    assert all(np.prod(dims) <= 8 * 24 for dims in moved), "hidden states and logits' sums, never the head"


@pytest.mark.parametrize("vocab", [2**15, 2**18])
@pytest.mark.parametrize(
    "name",
    ["sampled_token", "reverse_kl", "jsd", "binned_top_k", "student_top_k",
     *(pytest.param(name, marks=pytest.mark.slow) for name in ("tide", "adakd"))],
)  # fmt: skip
def test_the_memory_of_a_gradient_does_not_grow_with_the_vocabulary(name, vocab, monkeypatch):
    """Apart from arrays of the head's size, the temporary memory of a gradient is limited by LOGITS_BYTES."""
    monkeypatch.setattr(head, "LOGITS_BYTES", 2**21)
    rows, slots, width = 4, 128, 8
    model = Model(from_hf(dict(model_type="llama", vocab_size=vocab, hidden_size=width, intermediate_size=8,
                               num_hidden_layers=1, num_attention_heads=1)))  # fmt: skip
    params = jax.eval_shape(model.init, jax.random.key(0))

    def shape(*dims, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(dims, dtype)

    objective = OBJECTIVES[name]()
    sequences = Sequences(Prompts(shape(rows, 8), shape(rows)), shape(rows, slots), shape(rows))
    hidden = {"hidden": shape(rows, slots, width, dtype=jnp.float32)} if objective.teacher_logits else {}
    logits = shape(rows, slots, vocab, dtype=jnp.float32)
    record = hidden | jax.eval_shape(objective.read, logits, {"tokens": sequences.tokens})
    loss = Loss(model, objective, model if objective.teacher_logits else None)
    teacher_head = {name: params[name] for name in model.head_axes} if objective.teacher_logits else {}
    of_head, of_logits = 4 * vocab * width, 4 * rows * slots * vocab
    if objective.second_pass:
        reading, given = StudentReading(objective, loss.teacher), TeacherRecord(record, teacher_head)
        stored = jax.eval_shape(partial(empty_record, model, reading=reading), params, sequences, given=given)
        scorer = scoring(None).lower(
            model, params, stored, sequences, shape(rows), given, widths=Widths(8 + slots, slots, 0), reading=reading
        )
        needed = scorer.compile().memory_analysis().temp_size_in_bytes
        assert needed < 4 * of_head + 20 * 4 * max(2**19, rows * vocab) and needed < of_logits / 2
        one = shape(rows, slots, dtype=jnp.float32)
        mask, gaps = shape(rows, slots, dtype=jnp.bool), LogProbs(one, one)
        tokens = Tokens(sequences.tokens, mask, sequences.lengths, gaps, stored, None)
        record |= jax.eval_shape(objective.compare, tokens, objective.initial_state())
    inputs = LossInputs(sequences, shape(rows, slots, dtype=jnp.float32), record)
    program = GradientAccumulator(loss, None, 0).add.lower(
        loss, params, jax.eval_shape(zero_gradient, params), inputs, teacher_head,
        MicroBatchRows(shape(1, rows), shape()), widths=Widths(8 + slots, slots, 0),
    )  # fmt: skip
    needed = program.compile().memory_analysis().temp_size_in_bytes
    pieces = 8 if name == "sampled_token" else 20
    assert needed < 6 * of_head + pieces * 4 * max(2**19, rows * vocab), "some heads, some pieces of logits"
    assert needed < of_logits / 2
