"""Arithmetic against numbers worked out by hand."""

import dataclasses

import pytest

from camopd_jax.config.schema import MeshConfig, Method, Optimizer, RolloutConfig, Stream, TrainConfig
from camopd_jax.models.config import from_hf
from camopd_jax.models.shapes import SHAPES
from camopd_jax.planning import costs
from camopd_jax.planning.stages import Work, phase_shares, stage_work
from camopd_jax.planning.topology import CHIPS

MODEL = from_hf(dict(model_type="llama", vocab_size=11, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False))  # fmt: skip
CONFIG = TrainConfig(
    "g", "s", Stream("g"), Stream("d"),
    rollout=RolloutConfig(batch_size=10, max_prompt_tokens=3, max_response_tokens=2),
    optimizer=Optimizer(micro_batch=5),
)  # fmt: skip
MESH = {"data": 1, "fsdp": 1, "tensor": 1}


def test_weights_and_flops_by_hand():
    """A layer: q 4x2x2, k and v 4x1x2, o 2x2x4, gate, up and down 4x6: 16 + 16 + 16 + 72 weights and 2 norms of 4."""
    layer = 16 + 8 + 8 + 16 + 72
    assert costs.matrix_weights(MODEL) == 2 * layer + 44
    assert costs.weights(MODEL) == 2 * (layer + 8) + 4 + 2 * 44
    pairs = 4 + 5  # positions 3 and 4 see 4 and 5
    assert costs.forward_flops(MODEL, 10, 3, 5, 2) == 10 * (2 * 2 * 2 * layer + 2 * 2 * 44 + 4 * 2 * 2 * 2 * pairs)
    assert costs.cache_bytes(MODEL, 2) == 2 * 2 * 1 * 2 * 2
    assert costs.decode_bytes(MODEL, 10, 3, 2, 2) == 2 * (2 * layer + 44) * 2 + 10 * 16 * (3 + 4)


@pytest.mark.parametrize(
    "name, count", [("qwen3-4b-2507", 4_022_468_096), ("qwen3-8b", 8_190_735_360), ("qwen3-32b", 32_762_123_264)]
)
def test_shapes_have_the_sizes_of_their_cards(name, count):
    assert costs.weights(from_hf(SHAPES[name])) == count  # 4.0B, 8.2B, 32.8B


def test_a_stage_takes_as_long_as_its_slowest_limit():
    chip = dataclasses.replace(CHIPS["v5e"], flops=100.0, hbm_bandwidth=10.0, ici_bandwidth=4.0)
    assert Work(flops=800, done=800, read=10, received=4).seconds(chip, chips=2) == 4
    assert Work(flops=800, done=800, read=50, received=4).seconds(chip, chips=2) == 5
    assert Work(flops=800, done=800, read=50, received=12).seconds(chip, chips=2) == 6


def test_the_stages_of_a_step():
    config = dataclasses.replace(CONFIG, compute=dataclasses.replace(CONFIG.compute, remat="block"))
    work = stage_work(config, MODEL, MESH, "tpu", "recovery", 2)
    forward = costs.forward_flops(MODEL, 10, 0, 5, 2)
    learnt = costs.forward_flops(MODEL, 8, 0, 5, 2)  # 80 % of the mass lies in at most 80 % of the rows
    assert work["score teacher"].flops == work["score student"].flops == forward
    assert work["gradient"].flops == 3 * learnt and work["gradient"].done == 4 * learnt
    weights = costs.matrix_weights(MODEL) * 2
    assert work["score teacher"].read == 2 * weights, "two pieces of five rows"
    at_once = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, score_batch=10))
    assert stage_work(at_once, MODEL, MESH, "tpu", "recovery", 2)["score teacher"].read == weights
    assert work["decode"].read == 2 * weights + 10 * 16 * 2 * (3 + 2), "two turns, each over all five slots"
    assert work["update"].read == 7 * 4 * costs.weights(MODEL)
    assert {w.received for w in work.values()} == {0}, "one chip asks no other"
    assert "score student" not in stage_work(config, MODEL, MESH, "cpu", "recovery", 2), "float32: the sampler's"
    split = stage_work(config, MODEL, {"data": 1, "fsdp": 5, "tensor": 1}, "tpu", "recovery", 2)
    assert split["score teacher"].received == pytest.approx(2 * weights * 4 / 5), "gathered for each piece"
    assert split["decode"].received == split["prefill"].received == 0, "each chip has a copy to answer with"
    assert split["reshard"].received == pytest.approx(2 * costs.weights(MODEL) * 4 / 5), "of which a fifth was there"
    rollout = dataclasses.replace(config.rollout, mesh=MeshConfig(1, 5, 1))
    gathers = stage_work(dataclasses.replace(config, rollout=rollout), MODEL, dict(MESH, fsdp=5), "tpu", "recovery", 2)
    assert gathers["decode"].received == pytest.approx(2 * weights * 4 / 5), "two turns"


def test_the_rollouts_mesh():
    def sizes(**wanted):
        rollout = dataclasses.replace(CONFIG.rollout, mesh=MeshConfig(**{"tensor": 0} | wanted))
        return costs.rollout_sizes(dataclasses.replace(CONFIG, rollout=rollout), {"data": 1, "fsdp": 8, "tensor": 3})

    assert sizes() == {"data": 8, "fsdp": 1, "tensor": 3}
    assert sizes(tensor=2, fsdp=4) == {"data": 3, "fsdp": 4, "tensor": 2}


def test_waves_of_answers():
    """300 tokens each: a ring of 256 slots, then of 512, or of the cap; the second wave finds the ring grown."""
    assert costs.turns(64, 24, 300) == 3 * 300
    assert costs.slots_read(64, 64, 10, 300, 1000) == 300 * 10 + 256 * 256 + 44 * 512
    assert costs.slots_read(64, 32, 10, 300, 400) == 600 * 10 + 256 * 256 + 44 * 400 + 300 * 400
    mesh = {"data": 2, "fsdp": 1, "tensor": 4}
    assert costs.refills(64, 32, mesh) == (8, 4), "an eighth of the places at a time"
    assert costs.refills(64, 8, mesh) == (28, 2), "at least one a chip"
    assert costs.refills(64, 64, mesh)[0] == 0


def test_memory_follows_places_and_the_rollouts_tensor():
    config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, batch_size=16))
    mesh = {"data": 1, "fsdp": 8, "tensor": 1}

    def estimated(**changes):
        rollout = dataclasses.replace(config.rollout, **changes)
        return costs.memory_estimate(dataclasses.replace(config, rollout=rollout), MODEL, MODEL, mesh, "tpu")

    all_at_once, waves, split = estimated(), estimated(places=8), estimated(mesh=MeshConfig(tensor=2))
    copy, cache = 2 * costs.weights(MODEL), 16 * 2 * 5  # two places a chip, five slots of 16 bytes
    assert all_at_once["reshard"] == copy and all_at_once["decode"] == copy + cache * 1.5, "one of two layers twice"
    assert waves["decode"] == copy + cache / 2 * 1.5 and "refill" in waves and "refill" not in all_at_once
    assert split["reshard"] == copy / 2 and split["decode"] == copy / 2 + cache * 1.5, "twice the rows, half the heads"
    assert all_at_once["update"] == 4 * costs.weights(MODEL) / 8
    assert split["gradient"] == all_at_once["gradient"] and split["resident"] == all_at_once["resident"]


def test_a_residual_stream_waits_from_the_answers_to_the_gradient():
    def estimated(remat):
        config = dataclasses.replace(CONFIG, compute=dataclasses.replace(CONFIG.compute, remat=remat))
        return costs.memory_estimate(config, MODEL, MODEL, MESH, "tpu")

    plain, kept = estimated("block"), estimated("rollout")
    stream = 10 * 5 * 3 * 4 * 2  # ten rows of five slots, what enters two layers and what leaves, bfloat16
    assert costs.residual_bytes(MODEL, 2) == 3 * 4 * 2
    for name in ("score", "gradient"):
        assert kept[name] == plain[name] + stream
    assert kept["decode"] == plain["decode"] + 1.5 * stream and kept["update"] == plain["update"]
    config = dataclasses.replace(CONFIG, compute=dataclasses.replace(CONFIG.compute, remat="rollout"))
    assert stage_work(config, MODEL, MESH, "tpu", "recovery", 2)["gradient"].done == 3 * costs.forward_flops(
        MODEL, 8, 0, 5, 2
    )


def test_a_mixed_step_learns_from_both_streams():
    method = Method(schedule="mixed")
    config = dataclasses.replace(CONFIG, method=method, rollout=dataclasses.replace(CONFIG.rollout, batch_size=8))
    assert phase_shares(config) == {"mixed": 1.0}
    assert [costs.kept_rows(config, branch) for branch in ("recovery", "review")] == [5, 2]  # of 6 and 2
    assert stage_work(config, MODEL, MESH, "tpu", "mixed", 2)["gradient"].flops == 3 * costs.forward_flops(
        MODEL, 7, 0, 5, 2
    )
    assert phase_shares(CONFIG) == {"recovery": 0.75, "review": 0.25}
