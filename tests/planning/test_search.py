"""The search, on made-up memory: no compiler."""

import dataclasses

import pytest

from camopd_jax.config.schema import Compute, Evaluation, MeshConfig, Optimizer, RolloutConfig, Stream, TrainConfig
from camopd_jax.models.config import from_hf
from camopd_jax.planning import search
from camopd_jax.planning.arrays import Models
from camopd_jax.planning.peak import Peak
from camopd_jax.planning.search import Candidate, choose
from camopd_jax.planning.topology import CHIPS, Topology

MODEL = from_hf(dict(model_type="llama", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                     num_attention_heads=8, num_key_value_heads=4))  # fmt: skip
MODELS = Models(MODEL, MODEL)
CONFIG = TrainConfig(
    "g", "s", Stream("g"), Stream("d"), rollout=RolloutConfig(batch_size=16, max_prompt_tokens=32),
    optimizer=Optimizer(micro_batch=4), evaluation=Evaluation(batch_size=6), compute=Compute(remat="block"),
)  # fmt: skip
TOPOLOGY = Topology("v5e:2x4", "tpu", tuple(range(8)), CHIPS["v5e"], CHIPS["v5e"].hbm)


def candidate(mesh, **memory):
    return Candidate(mesh, mesh[2], 0, 4, "block", "off", 8, {"resident": 1.0, **memory}, 1.0)


def test_meshes_divide_what_they_split():
    found = set(search.meshes(8, [MODEL]))
    assert all(d * f * t == 8 for d, f, t in found)
    assert {t for _, _, t in found} == {1, 2, 4}, "4 key-value heads"
    assert (1, 8, 1) in found and (8, 1, 1) in found and (1, 2, 4) in found


def test_every_candidate_divides_its_batches():
    found = search.candidates(CONFIG, MODELS, TOPOLOGY, answer=64)
    assert found and all(c.peak <= TOPOLOGY.hbm for c in found)
    for c in found:
        shards = c.mesh[0] * c.mesh[1]
        assert c.micro_batch % shards == 0 == 16 % c.micro_batch and c.evaluation_batch % shards == 0
        assert 4 % c.rollout_tensor == 0 == (c.places or 16) % (8 // c.rollout_tensor)
    assert {(c.rollout_tensor, c.places) for c in found} == {(1, 0), (1, 8), (2, 0), (2, 8), (2, 4)} | {
        (4, places) for places in (0, 8, 4, 2)
    }
    kept = [c for c in found if c.offload == "off"]
    assert kept == found[: len(kept)] and 2 * len(kept) == len(found), "nothing goes to the hosts where it need not"
    assert [c.seconds for c in kept] == sorted(c.seconds for c in kept)
    four = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, score_batch=4))
    shards = {c.mesh[0] * c.mesh[1] for c in search.candidates(four, MODELS, TOPOLOGY, answer=64)}
    assert shards and max(shards) == 4 < max(c.mesh[0] * c.mesh[1] for c in found), "a run would refuse 8"
    small = dataclasses.replace(TOPOLOGY, hbm=1.0)
    assert [c.peak for c in search.candidates(CONFIG, MODELS, small, 64)] == sorted(c.peak for c in found)


def test_the_first_that_the_compiler_lets_fit_is_taken():
    ordered = [
        candidate((8, 1, 1), decode=9.0), candidate((4, 2, 1), decode=8.9), candidate((1, 8, 1), decode=4.0),
        candidate((1, 4, 2), decode=2.0),
    ]  # fmt: skip
    peaks = {(8, 1, 1): 20.0, (4, 2, 1): 9.0, (1, 8, 1): 8.0, (1, 4, 2): 3.0}
    found, tried = choose(ordered, lambda c: Peak("decode", peaks[c.mesh], True), limit=10.0, tries=3)
    assert found.mesh == (1, 8, 1), "(4, 2, 1) is passed over: it asks for about what failed"
    assert [t.candidate.mesh for t in tried] == [(8, 1, 1), (1, 8, 1)]
    assert choose(ordered, lambda c: Peak("decode", 11.0, True), 10.0, tries=2)[0] is None
    refused, tried = choose(ordered[:1], lambda c: Peak("score: student", 1.0, False), 10.0, tries=2)
    assert refused is None and len(tried) == 1, "what the compiler refuses does not fit, whatever it says it needs"


def test_flags_name_what_differs():
    one = dataclasses.replace(candidate((1, 4, 2)), rollout_tensor=4, places=8)
    flags = ["--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--config.rollout.mesh.tensor=4"]
    assert one.flags(CONFIG) == [*flags, "--config.rollout.places=8", "--config.evaluation.batch_size=8"]
    applied = one.applied(CONFIG)
    assert applied.rollout.mesh == MeshConfig(-1, 1, 4) and applied.rollout.places == 8
    assert one.flags(applied) == flags
    assert (applied.mesh.fsdp, applied.evaluation.batch_size, applied.optimizer.micro_batch) == (4, 8, 4)


def test_what_fits_only_with_the_hosts_memory_says_so():
    least = {
        offload: min(c.peak for c in search.candidates(CONFIG, MODELS, TOPOLOGY, 64) if c.offload == offload)
        for offload in ("off", "late")
    }
    assert least["late"] < least["off"]
    between = dataclasses.replace(TOPOLOGY, hbm=(least["late"] + least["off"]) / 2)
    best = search.candidates(CONFIG, MODELS, between, 64)[0]
    assert best.peak <= between.hbm and "--config.compute.offload=late" in best.flags(CONFIG)


def test_where_nothing_fits_it_says_how_much_shorter():
    long = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, max_response_tokens=2**16))
    tight = dataclasses.replace(TOPOLOGY, hbm=2.0**20)
    assert search.candidates(long, MODELS, tight, 64)[0].peak > tight.hbm
    told = search.shorter(long, MODELS, tight)
    assert "config.rollout.max_response_tokens <= " in told
    fits = int(told.split("max_response_tokens <= ")[1].split()[0])
    shorter = dataclasses.replace(long, rollout=dataclasses.replace(long.rollout, max_response_tokens=fits))
    assert search.candidates(shorter, MODELS, tight, 64)[0].peak == pytest.approx(tight.hbm, rel=0.6)
