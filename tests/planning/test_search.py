"""The search, on made-up memory: no compiler."""

import dataclasses

import jax

from camopd_jax.config.schema import Compute, Evaluation, MeshConfig, Optimizer, RolloutConfig, TrainConfig
from camopd_jax.method.setup import resolve
from camopd_jax.models.config import from_hf
from camopd_jax.planning import search
from camopd_jax.planning.arrays import ModelShapes
from camopd_jax.planning.compiling import Peak
from camopd_jax.planning.search import Candidate, changed, choose
from camopd_jax.planning.topology import CHIPS, Topology

MODEL = from_hf(dict(model_type="llama", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                     num_attention_heads=8, num_key_value_heads=4))  # fmt: skip
MODELS = ModelShapes({"general": MODEL, "specialised": MODEL})
CONFIG = TrainConfig(
    "g",
    "s",
    rollout=RolloutConfig(batch_size=16, max_prompt_tokens=32),
    optimizer=Optimizer(micro_batch=4),
    evaluation=Evaluation(batch_size=6),
    compute=Compute(remat="block", matmul="bfloat16"),
)
TOPOLOGY = Topology("v5e:2x4", "tpu", tuple(jax.devices()), CHIPS["v5e"], CHIPS["v5e"].hbm)


def candidates(config=CONFIG, topology=TOPOLOGY, models=MODELS):
    return search.candidates(config, models, topology, answer=64)


def candidate(mesh, **memory):
    changes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    return Candidate(changes, memory, 1.0)


def mesh_of(one):
    return tuple(one.changes[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor"))


def test_meshes_divide_what_they_split():
    meshes = {mesh_of(one) for one in candidates()}
    assert all(d * f * t == 8 for d, f, t in meshes)
    assert {t for _, _, t in meshes} == {1, 2, 4}, "4 key-value heads"
    assert {(1, 8, 1), (8, 1, 1), (1, 2, 4)} < meshes
    teacher = dataclasses.replace(MODEL, num_kv_heads=2)
    three = ModelShapes(MODELS.shapes | {"/models/law": teacher})
    assert {mesh_of(one)[2] for one in candidates(models=three)} == {1, 2}, "every teacher's too"


def test_every_candidate_is_a_run_that_starts():
    several = candidates()
    assert several and all(c.peak <= TOPOLOGY.hbm for c in several)
    for c in several[:: len(several) // 50]:
        setup = resolve(changed(CONFIG, c.changes), TOPOLOGY.devices)
        assert 16 % setup.config.optimizer.micro_batch == 0
    settings = {(c.changes["rollout.mesh.tensor"], c.changes["rollout.concurrency"]) for c in several}
    assert settings == {(1, 0), (1, 8), (2, 0), (2, 8), (2, 4)} | {(4, lanes) for lanes in (0, 8, 4, 2)}
    kept = [c for c in several if c.changes["compute.offload"] == "off"]
    assert kept == several[: len(kept)] and 2 * len(kept) == len(several), "nothing goes to hosts where it need not"
    assert [c.seconds for c in kept] == sorted(c.seconds for c in kept)
    four = candidates(changed(CONFIG, {"rollout.score_batch": 4}))
    shards = [{d * f for d, f, _ in map(mesh_of, some)} for some in (four, several)]
    assert shards[0] and max(shards[0]) == 4 < max(shards[1]), "a run would refuse 8"
    small = candidates(topology=dataclasses.replace(TOPOLOGY, hbm=1.0))
    assert [c.peak for c in small] == sorted(c.peak for c in small)
    assert candidates(changed(CONFIG, {"rollout.batch_size": 3})) == [], "no mesh of eight divides three"


def test_the_search_counts_answers():
    """Of 16 prompts with 3 answers each, lanes are multiples of 3 and micro-batches divide 48."""
    config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, answers_per_prompt=3))
    several = candidates(config)
    for c in several[:: len(several) // 20]:
        resolve(changed(config, c.changes), TOPOLOGY.devices)
    assert {c.changes["rollout.concurrency"] for c in several} == {0, 24, 12, 6}
    assert 48 in {c.changes["optimizer.micro_batch"] for c in several}


def test_frozen_parameters_leave_more_room():
    every, some = candidates(), candidates(changed(CONFIG, {"optimizer.trained": "mlp"}))
    peaks = [{str(c.changes): c.peak for c in of} for of in (every, some)]
    assert peaks[0].keys() == peaks[1].keys() and all(peaks[1][name] < peak for name, peak in peaks[0].items())


def test_the_first_that_the_compiler_lets_fit_is_taken():
    ordered = [
        candidate((8, 1, 1), decode=9.0), candidate((4, 2, 1), decode=8.9), candidate((1, 8, 1), decode=4.0),
        candidate((1, 4, 2), decode=2.0),
    ]  # fmt: skip
    peaks = {(8, 1, 1): 20.0, (4, 2, 1): 9.0, (1, 8, 1): 8.0, (1, 4, 2): 3.0}
    tried = choose(ordered, lambda c: Peak("decode", peaks[mesh_of(c)], False), limit=10.0, tries=3)
    meshes = [mesh_of(one) for one, _ in tried]
    assert meshes == [(8, 1, 1), (1, 8, 1)], "(4, 2, 1) is passed over: it asks for about what failed"
    assert [peak.fits(10.0) for _, peak in tried] == [False, True]
    assert not any(peak.fits(10.0) for _, peak in choose(ordered, lambda c: Peak("decode", 11.0, False), 10.0, tries=2))
    ((_, refused),) = choose(ordered[:1], lambda c: Peak("score: student", 1.0, True), 10.0, tries=2)
    assert not refused.fits(10.0), "what the compiler refuses does not fit, whatever it says it needs"


def test_flags_name_what_differs():
    wanted = dict(zip(("data", "fsdp", "tensor"), (1, 4, 2), strict=True))

    def choice(c):
        lanes, tensor = c.changes["rollout.concurrency"], c.changes["rollout.mesh.tensor"]
        same = c.changes["optimizer.micro_batch"] == 4 and c.changes["compute.remat"] == "block"
        return mesh_of(c) == (1, 4, 2) and (lanes, tensor) == (8, 4) and same and c.changes["compute.offload"] == "off"

    (one,) = filter(choice, candidates())
    flags = [*(f"--config.mesh.{axis}={n}" for axis, n in wanted.items()), "--config.rollout.mesh.tensor=4"]
    assert one.flags(CONFIG) == [*flags, "--config.rollout.concurrency=8", "--config.evaluation.batch_size=8"]
    applied = changed(CONFIG, one.changes)
    assert applied.rollout.mesh == MeshConfig(-1, 1, 4, 0) and applied.rollout.concurrency == 8
    assert one.flags(applied) == flags
    assert (applied.mesh.fsdp, applied.evaluation.batch_size, applied.optimizer.micro_batch) == (4, 8, 4)


def test_what_fits_only_with_the_hosts_memory_says_so():
    least = {
        offload: min(c.peak for c in candidates() if c.changes["compute.offload"] == offload)
        for offload in ("off", "late")
    }
    assert least["late"] < least["off"]
    between = dataclasses.replace(TOPOLOGY, hbm=(least["late"] + least["off"]) / 2)
    best = candidates(topology=between)[0]
    assert best.peak <= between.hbm and "--config.compute.offload=late" in best.flags(CONFIG)
