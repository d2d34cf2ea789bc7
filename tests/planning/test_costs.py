"""Arithmetic against numbers worked out by hand."""

import dataclasses

import pytest

from camopd_jax.config import Method, Optimizer, RolloutConfig, Stream, TrainConfig
from camopd_jax.models.config import from_hf
from camopd_jax.models.shapes import SHAPES
from camopd_jax.planning import costs
from camopd_jax.planning.costs import Work
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


def test_an_8b_model_is_one():
    assert costs.weights(from_hf(SHAPES["qwen3-8b"])) == 8_190_735_360  # as its card has it: 8.2B


def test_a_stage_takes_as_long_as_its_slowest_limit():
    chip = dataclasses.replace(CHIPS["v5e"], flops=100.0, hbm_bandwidth=10.0, ici_bandwidth=4.0)
    assert Work(flops=800, done=800, read=10, received=4).seconds(chip, chips=2) == 4
    assert Work(flops=800, done=800, read=50, received=4).seconds(chip, chips=2) == 5
    assert Work(flops=800, done=800, read=50, received=12).seconds(chip, chips=2) == 6


def test_the_stages_of_a_step():
    config = dataclasses.replace(CONFIG, compute=dataclasses.replace(CONFIG.compute, remat="block"))
    work = costs.stage_work(config, MODEL, MESH, "tpu", "recovery", 2)
    forward = costs.forward_flops(MODEL, 10, 0, 5, 2)
    learnt = costs.forward_flops(MODEL, 8, 0, 5, 2)  # 80 % of the mass lies in at most 80 % of the rows
    assert work["score teacher"].flops == work["score student"].flops == forward
    assert work["update"].flops == 3 * learnt and work["update"].done == 4 * learnt
    assert work["decode"].read == costs.decode_bytes(MODEL, 10, 3, 2, 2)
    assert {w.received for w in work.values()} == {0}, "one chip asks no other"
    assert "score student" not in costs.stage_work(config, MODEL, MESH, "cpu", "recovery", 2), "float32: the sampler's"
    split = costs.stage_work(config, MODEL, {"data": 1, "fsdp": 5, "tensor": 1}, "tpu", "recovery", 2)
    assert split["score teacher"].received == pytest.approx(costs.matrix_weights(MODEL) * 2 * 4 / 5)


def test_a_mixed_step_learns_from_both_streams():
    method = Method(schedule="mixed")
    config = dataclasses.replace(CONFIG, method=method, rollout=dataclasses.replace(CONFIG.rollout, batch_size=8))
    assert costs.phase_shares(config) == {"mixed": 1.0}
    assert costs.kept_rows(config, "mixed") == 5 + 2  # of 6 and 2
    assert costs.phase_shares(CONFIG) == {"recovery": 0.75, "review": 0.25}
