"""Arithmetic against numbers worked out by hand."""

import dataclasses
import math

import jax
import pytest

from camopd_jax.config.schema import Compute, MeshConfig, Method, Optimizer, RolloutConfig, SelectionConfig, TrainConfig
from camopd_jax.method import schedule
from camopd_jax.method.setup import resolve
from camopd_jax.models.config import from_hf
from camopd_jax.models.shapes import SHAPES
from camopd_jax.planning import costs
from camopd_jax.planning.arrays import ModelShapes
from camopd_jax.planning.costs import Work, step_work
from camopd_jax.planning.search import changed
from camopd_jax.planning.topology import CHIPS
from camopd_jax.runtime.mesh import make_mesh

MODEL = from_hf(dict(model_type="llama", vocab_size=11, hidden_size=40, intermediate_size=60, num_hidden_layers=2,
                     num_attention_heads=10, num_key_value_heads=5, head_dim=2, tie_word_embeddings=False))  # fmt: skip
MODELS = ModelShapes({"general": MODEL, "specialised": MODEL})
CONFIG = TrainConfig(
    "g",
    "s",
    rollout=RolloutConfig(batch_size=10, max_prompt_tokens=3, max_response_tokens=2),
    optimizer=Optimizer(micro_batch=5),
    compute=Compute(matmul="bfloat16"),
)
LAYER = 40 * 20 + 2 * 40 * 10 + 20 * 40 + 3 * 40 * 60  # query; key and value; output; gate, up and down
N = 2 * (LAYER + 2 * 40) + 40 + 2 * 11 * 40  # with norms, embedding and head


def setup(mesh=(1, 1, 1), config=CONFIG, **changes):
    made = changed(config, {"mesh": MeshConfig(*mesh), "evaluation.batch_size": mesh[0] * mesh[1]} | changes)
    return resolve(made, jax.devices()[: math.prod(mesh)])


def test_weights_and_flops_by_hand():
    assert costs.matrix_weights(MODEL) == 2 * LAYER + 11 * 40
    assert costs.weights(MODEL) == N
    assert costs.weights(MODEL, "mlp.*kernel") == 2 * 3 * 40 * 60
    pairs = 4 + 5  # positions 3 and 4 see 4 and 5
    dense = 2 * 2 * 2 * LAYER + 2 * 2 * 11 * 40
    assert costs.forward_flops(MODEL, 10, 3, 5, 2) == 10 * (dense + 4 * 2 * 10 * 2 * pairs)
    assert costs.cache_bytes(MODEL, 2) == 2 * 2 * 5 * 2 * 2


@pytest.mark.parametrize(
    "name, count",
    [
        ("qwen3-4b-2507", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("gpt-oss-20b", 20_914_757_184),
        ("granite-3.3-8b", 8_170_864_640),
        ("olmo2-1b", 1_484_916_736),
        ("olmo3-7b", 7_298_011_136),
        ("phi-4-mini", 3_836_021_760),
        ("glm4-9b", 9_400_279_040),
        ("smollm3-3b", 3_075_098_624),
    ],
)
def test_shapes_have_the_sizes_of_their_cards(name, count):
    assert costs.weights(from_hf(SHAPES[name])) == count


def test_a_token_costs_only_its_experts():
    """3.3 billion parameters of Qwen3-30B-A3B: by hand, without norms and the embedding, 48 layers of 8 experts."""
    config = from_hf(SHAPES["qwen3-30b-a3b"])
    attention, expert, router, head = 2048 * 128 * (32 + 4 + 4 + 32), 3 * 2048 * 768, 2048 * 128, 151936 * 2048
    assert costs.matrix_weights(config) == 48 * (attention + router + 128 * expert) + head
    assert costs.matrix_weights(config, per_token=True) == 48 * (attention + router + 8 * expert) + head
    scores = 48 * 4 * 32 * 128 * (1 + 2 + 3)
    assert costs.forward_flops(config, 1, 0, 3, 0) == 3 * 2 * 48 * (attention + router + 8 * expert) + scores
    assert costs.weights(config) - costs.weights(config, "all") == 48 * router, "routers are frozen"


def test_memory_of_a_second_embedding():
    """Its gradient is added to the sum of earlier ones; it has 3 x 8 numbers for each token."""
    text = dict(model_type="gemma4_text", vocab_size=98, hidden_size=60, intermediate_size=56, num_hidden_layers=3,
                layer_types=["sliding_attention", "full_attention", "full_attention"], hidden_size_per_layer_input=8,
                num_attention_heads=6, num_key_value_heads=2, head_dim=14, global_head_dim=22)  # fmt: skip
    few, many = (from_hf(text | {"vocab_size_per_layer_input": count}) for count in (100, 200))
    sizes = [costs.memory_estimate(setup(), ModelShapes({"general": of, "specialised": of})) for of in (few, many)]
    more = {name: sizes[1][name] - sizes[0][name] for name in ("update", "gradient")}
    assert more["gradient"] - more["update"] == 4 * 100 * 3 * 8


def test_experts_are_divided_over_their_axis():
    """Qwen3-30B-A3B on 2 groups of rows with 4 groups of experts each: every group repeats what is not the experts'."""
    config, mesh = from_hf(SHAPES["qwen3-30b-a3b"]), make_mesh(1, 2, 1, expert=4)
    every, expert = costs.weights(config), 48 * 128 * 3 * 2048 * 768
    assert costs.weights_on_chip(config, mesh) == (every - expert + expert / 4) / 2
    assert costs.weights_on_chip(config, mesh, "router") == 48 * 128 * 2048 / 2
    share = costs.Share(config, mesh, "bfloat16")
    assert share.multiplied == 2 * (costs.matrix_weights(config) - expert * 3 / 4)
    active, flops = 2 * expert * 8 / 128, costs.forward_flops(config, 1, 0, 3, 0)
    assert share.done(flops, 3) == 4 * (flops - 3 * active) + 3 * active


def test_a_stage_takes_as_long_as_its_slowest_limit():
    chip = dataclasses.replace(CHIPS["v5e"], flops=100.0, hbm_bandwidth=10.0, ici_bandwidth=4.0)
    assert Work(flops=800, done=800, read=10, received=4).limits(chip, 2) == {"products": 4, "HBM": 1, "links": 2}
    assert Work(flops=800, done=800, read=10, received=4).seconds(chip, chips=2) == 4
    assert Work(flops=800, done=800, read=50, received=4).seconds(chip, chips=2) == 5
    assert Work(flops=800, done=800, read=50, received=12).seconds(chip, chips=2) == 6


RECOVERY = {
    "branches": {name: dataclasses.replace(of, steps=int(name == "recovery")) for name, of in CONFIG.branches.items()}
}


def work_of(mesh=(1, 1, 1), models=MODELS, **changes):
    """Of a recovery."""
    return step_work(setup(mesh, **RECOVERY, **changes), models, 2)


def test_the_stages_of_a_step():
    work = work_of()
    forward = costs.forward_flops(MODEL, 10, 0, 5, 2)
    learnt = costs.forward_flops(MODEL, 8, 0, 5, 2)  # 80 % of the mass lies in at most 80 % of the rows
    assert work["score teacher"].flops == work["score student"].flops == forward
    assert work["gradient"].flops == 3 * learnt and work["gradient"].done == 4 * learnt
    weights = costs.matrix_weights(MODEL) * 2
    assert work["score teacher"].read == 2 * weights, "two micro-batches of five rows"
    assert work_of(**{"rollout.score_batch": 10})["score teacher"].read == weights
    assert work["decode"].read == 2 * weights + 10 * 80 * 2 * (3 + 2), "two turns, each over all five slots"
    assert work["update"].read == 7 * 4 * N
    assert {w.received for w in work.values()} == {0}, "one chip asks no other"
    assert "score student" not in work_of(**{"compute.matmul": "float32"}), "float32: the sampler's"
    split = work_of((1, 5, 1))
    assert split["score teacher"].received == pytest.approx(2 * weights * 4 / 5), "gathered for each micro-batch"
    assert split["decode"].received == split["prefill"].received == 0, "each chip has a copy to answer with"
    assert split["gradient"].received == pytest.approx(2 * (2 * weights * 4 / 5 + 4 * N * 4 / 5)), "and reduced"
    copies = work_of((5, 1, 1))
    assert copies["gradient"].received == pytest.approx(2 * 2 * 4 * N * 4 / 5), "around a ring, there and back"
    assert copies["score teacher"].received == 0
    gathers = work_of((1, 5, 1), **{"rollout.mesh": MeshConfig(1, 5, 1)})
    assert gathers["decode"].received == pytest.approx(2 * weights * 4 / 5), "two turns"


def test_several_answers_share_the_work_of_their_prompt():
    """2 prompts with 5 answers each are 10 rows, like 10 prompts, but the prefill reads 2 prompts, not 10."""
    ten, two = (work_of(**{"rollout.batch_size": n, "rollout.answers_per_prompt": 10 // n}) for n in (10, 2))
    assert two["prefill"].flops == ten["prefill"].flops / 5 == costs.forward_flops(MODEL, 2, 0, 3, 0)
    assert {k: w for k, w in two.items() if k != "prefill"} == {k: w for k, w in ten.items() if k != "prefill"}
    grouped = setup(**{"rollout.batch_size": 2, "rollout.answers_per_prompt": 5, "rollout.concurrency": 5})
    assert costs.refills(grouped, 10) == (1, 5), "a prompt enters with all its answers"
    assert costs.kept_rows(grouped, "recovery") == 8
    recovery = dataclasses.replace(CONFIG.branches["recovery"], selection=SelectionConfig(keep="density"))
    dense = dataclasses.replace(grouped.config, branches={"recovery": recovery})
    assert costs.kept_rows(setup(config=dense), "recovery") == 10


def test_each_teacher_scores_with_its_own_shape_and_frozen_parameters_cost_no_gradient():
    small = from_hf(SHAPES["tiny"])
    work = work_of(models=ModelShapes({"general": small, "specialised": MODEL}))
    assert work["score teacher"].flops == costs.forward_flops(small, 10, 0, 5, 2)
    part = costs.weights(MODEL, "mlp") / N
    frozen = work_of(**{"optimizer.trained": "mlp"})
    assert frozen["gradient"].flops == pytest.approx((2 + part) * costs.forward_flops(MODEL, 8, 0, 5, 2))
    assert frozen["update"].read == pytest.approx(7 * 4 * N * part)


def test_waves_of_answers():
    """300 tokens each: a ring of 256 slots, then of 512, or of the cap; the second wave finds the ring grown."""
    assert costs.slots_read(1, 10, 300, 1000) == 300 * 10 + 256 * 256 + 44 * 512
    assert costs.slots_read(2, 10, 300, 400) == 600 * 10 + 256 * 256 + 44 * 400 + 300 * 400
    assert costs.slots_read(1, 10, 256, 400) == 256 * 10 + 256 * 256, "the ring has not grown yet"

    def of(lanes):
        changes = {"rollout.batch_size": 64, "rollout.concurrency": lanes, "optimizer.micro_batch": 64}
        made = setup((2, 1, 4), TrainConfig("g", "s"), **changes)
        return costs.waves_of(made, 64), *costs.refills(made, 64)

    assert of(32) == (2, 8, 4), "an eighth of the lanes at a time"
    assert of(24)[0] == 3 and of(8) == (8, 28, 2), "at least one a chip"
    assert of(0)[:2] == (1, 0)


def estimated(mesh=(1, 1, 1), models=MODELS, **changes):
    return costs.memory_estimate(setup(mesh, **changes), models)


def test_memory_follows_concurrency_and_the_rollouts_tensor():
    sixteen = {"rollout.batch_size": 20, "optimizer.micro_batch": 5}
    mesh = (1, 5, 1)
    all_at_once, waves = estimated(mesh, **sixteen), estimated(mesh, **sixteen, **{"rollout.concurrency": 10})
    resident, copy, cache = N / 5 * (4 + 8 + 2 + 2), 2 * N, 80 * 4 * 5  # four lanes a chip, five slots of 80 bytes
    assert all_at_once["decode"] == pytest.approx(resident + copy + cache * 1.5), "one of two layers twice"
    assert waves["decode"] == pytest.approx(resident + copy + cache / 2 * 1.5)
    assert "refill" in waves and "refill" not in all_at_once
    split = estimated(mesh, **sixteen, **{"rollout.mesh": MeshConfig(-1, 1, 5)})
    assert split["decode"] == pytest.approx(resident + copy / 5 + cache * 1.5), "all rows, a fifth of their heads"
    assert all_at_once["update"] == pytest.approx(resident + 4 * N / 5)
    assert split["gradient"] == all_at_once["gradient"]


def test_what_is_frozen_has_no_moments_and_no_gradient():
    part = costs.weights(MODEL, "mlp")
    every, some = estimated(), estimated(**{"optimizer.trained": "mlp"})
    assert every["decode"] - some["decode"] == 8 * (N - part), "moments"
    assert every["update"] - some["update"] == 12 * (N - part)
    during = 4 * (11 * 40 + 2 * LAYER * (1 - part / (2 * (LAYER + 2 * 40))))  # of the head and of two layers
    assert every["gradient"] - some["gradient"] == pytest.approx(12 * (N - part) + during)
    separate = estimated(**{"optimizer.trained": "mlp", "method.moments": "separate"})
    assert separate["decode"] - some["decode"] == 8 * part


def test_an_average_takes_as_much_as_the_parameters_and_is_offloaded_with_the_moments():
    every, average = estimated(), estimated(**{"optimizer.average": 0.99})
    assert {name: average[name] - every[name] for name in every} == dict.fromkeys(every, 4 * N)
    late = {"compute.offload": "late"}
    offloaded = estimated(**late), estimated(**late, **{"optimizer.average": 0.99})
    assert {name: offloaded[1][name] - offloaded[0][name] for name in every} == dict.fromkeys(every, 0) | {
        "update": 4 * N
    }


def test_all_teachers_are_there_or_under_offload_the_one_that_scores():
    large = from_hf(SHAPES["tiny"])
    three = ModelShapes({"general": MODEL, "specialised": MODEL, "law": large})
    kept, offloaded = estimated(models=three), estimated(models=three, **{"compute.offload": "late"})
    ahead = estimated(models=three, **{"compute.offload": "ahead"})
    teachers = 2 * (2 * N + costs.weights(large))
    assert kept["update"] == 4 * N + 8 * N + teachers + 4 * N
    assert kept["decode"] - offloaded["decode"] == 8 * N + teachers - 2 * costs.weights(large)
    assert kept["update"] - offloaded["update"] == teachers
    assert kept["gradient"] - offloaded["gradient"] == 8 * N + teachers
    assert kept["gradient"] - ahead["gradient"] == teachers


def test_a_mixed_step_learns_from_all_branches():
    mixed = setup(method=Method(schedule="mixed"), **{"rollout.batch_size": 8, "optimizer.micro_batch": 4})
    assert schedule.phases(mixed.config) == {"mixed": 1.0}
    assert [costs.kept_rows(mixed, branch) for branch in ("recovery", "review")] == [5, 2]  # of 6 and 2
    learnt = costs.forward_flops(MODEL, 7, 0, 5, 2)
    assert step_work(mixed, MODELS, 2)["gradient"].flops == pytest.approx(3 * learnt)


def test_an_alternating_step_is_the_mean_of_its_branches():
    small, chip = from_hf(SHAPES["tiny"]), CHIPS["v5e"]
    models = ModelShapes({"general": small, "specialised": MODEL})
    work = step_work(setup(), models, 2)
    flops = [costs.forward_flops(model, 10, 0, 5, 2) for model in (small, MODEL)]
    assert work["score teacher"].flops == pytest.approx(0.75 * flops[0] + 0.25 * flops[1])
    assert work["score student"].flops == pytest.approx(flops[1])
    assert costs.step_seconds(setup(), models, 2, chip) == sum(w.seconds(chip, 1) for w in work.values())


def test_a_residual_stream_spares_a_forward_pass():
    work = work_of(**{"rollout.student_logprobs": "sampler", "compute.remat": "rollout"})
    assert work["gradient"].done == 3 * costs.forward_flops(MODEL, 8, 0, 5, 2)
