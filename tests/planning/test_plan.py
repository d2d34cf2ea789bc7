"""The plan itself: a small run compiled by the TPU's compiler for chips that are not here, and by this machine's."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console
from unwanted import unwanted

from camopd_jax.config.schema import (
    BranchConfig,
    Compute,
    Evaluation,
    MeshConfig,
    Method,
    Optimizer,
    RolloutConfig,
    TrainConfig,
)
from camopd_jax.errors import UserError
from camopd_jax.method import programs as method
from camopd_jax.models.config import from_hf
from camopd_jax.models.shapes import SHAPES
from camopd_jax.planning import hlo, topology
from camopd_jax.planning.arrays import ModelShapes, abstract_params, chip_bytes, plan
from camopd_jax.planning.compiling import compile_program, peak, refusal
from camopd_jax.planning.costs import bytes_on_chip, memory_estimate, step_work
from camopd_jax.planning.hlo import Module
from camopd_jax.planning.programs import programs, residents
from camopd_jax.planning.report import Request, look_for, read_models
from camopd_jax.planning.search import changed
from camopd_jax.rollout import generate
from camopd_jax.rollout.sampling import row_keys
from camopd_jax.runtime.mesh import global_rows, make_mesh
from camopd_jax.types import Prompts

ROOT = Path(__file__).parents[2]
LAYERS, VOCAB = 3, 1536
FIELDS = dict(model_type="llama", vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS,
              num_attention_heads=4, num_key_value_heads=2, head_dim=128, tie_word_embeddings=False)  # fmt: skip
MODEL, DEEPER = from_hf(FIELDS), from_hf(FIELDS | {"num_hidden_layers": 5, "vocab_size": VOCAB + 128})
MODELS = ModelShapes({"general": MODEL, "specialised": MODEL}, (2,))
CONFIG = TrainConfig(
    "g",
    "s",
    rollout=RolloutConfig(batch_size=16, max_prompt_tokens=128, max_response_tokens=512, concurrency=8),
    optimizer=Optimizer(micro_batch=4),
    mesh=MeshConfig(1, 4, 2),
    evaluation=Evaluation(batch_size=8),
    compute=Compute(logits_chunk=64),
)
BFLOAT16 = {"compute.matmul": "bfloat16"}  # as on the chips; this machine's own is float32
libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: .[plan]")


ALONE = {"mesh": MeshConfig(), "rollout.max_prompt_tokens": 16, "rollout.max_response_tokens": 16}  # quick to compile


def planned(models=MODELS, devices=8, **changes):
    return plan(changed(CONFIG, changes), models, jax.devices()[:devices])


def by_name(made):
    return {program.name: program for program in programs(made)}


@pytest.fixture(scope="module")
def compiled():
    """The programs of a recovery on a v5e:2x4, where answers come from a mesh of 4 x 1 x 2."""
    where = topology.describe("v5e:2x4")
    made = plan(CONFIG, MODELS, where.devices)
    others = ("select", "update: review", "gradient: review", "score: review", "prefill")  # the refill is a prefill
    wanted = {name: program for name, program in by_name(made).items() if not name.startswith(others)}
    modules = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hlo, "Module", lambda text: modules.append(Module(text)) or modules[-1])
        reports = {name: (program, compile_program(program)) for name, program in wanted.items()}
    return made, reports, dict(zip(wanted, modules, strict=True))


@libtpu
def test_the_compilers_arguments_are_those_of_shapes_and_shardings(compiled):
    made, of, _ = compiled
    assert made.setup.dtype == "bfloat16", "as on the chips, not as on this machine"
    for program, report in of.values():
        ours = chip_bytes(program.args)
        leaves = len(jax.tree.leaves(program.args))
        least = ours * 0.999  # an update does not read the prompts
        assert least <= report.memory["arguments"] <= ours + 1024 * leaves, "small arrays are padded"
        assert report.memory["code"] > 0 and report.refused is None
    params = chip_bytes(made.params)
    assert chip_bytes(made.teachers["general"][1]) * 2 == params, "teachers are bfloat16"
    update, gradient, decode = (of[name][1] for name in ("update: recovery", "gradient: recovery", "decode"))
    donated = chip_bytes(made.state)
    assert donated <= update.memory["aliased"] <= donated + 2**17
    for report in (update, gradient, decode):
        assert report.added < 2**17, "what is donated takes its old place"
    assert gradient.holds["gradient"] == pytest.approx(params, rel=0.02) and gradient.memory["aliased"] >= params
    moves = {name: report.memory["outputs"] * report.runs for name, (_, report) in of.items() if "reshard" in name}
    assert sum(moves.values()) == pytest.approx(decode.holds["weights"], rel=0.01), "what decoding takes"
    assert decode.holds["weights"] == pytest.approx(2 * params, rel=0.01), "bfloat16, but complete over fsdp"


@libtpu
def test_parameters_are_gathered_by_the_layer_and_logits_by_the_chunk(compiled):
    made, of, modules = compiled
    assert {name: shapes for name, module in modules.items() if (shapes := unwanted(module, of[name][0], made))} == {}
    score, gradient, decode = (of[name][1] for name in ("score: student", "gradient: recovery", "decode"))
    gathers = score.collectives["all-gather"]
    assert LAYERS * gathers.count > gathers.runs > gathers.count > 0, "of the layers' loop and outside"
    assert gradient.collectives["all-gather"].runs > 1.5 * gathers.runs, "forward, and again in the backward pass"
    assert gradient.collectives["reduce-scatter"].bytes_run > score.collectives["reduce-scatter"].bytes_run
    assert (score.runs, gradient.runs, of["refill"][1].runs) == (4, 4, 2), "16 rows, 13 kept, by fours; 8 of 16 wait"
    turns = 2 * CONFIG.rollout.max_response_tokens  # two waves
    assert of["decode"][0].trips == turns and max(t.runs for t in decode.collectives.values()) >= turns
    assert "all-gather" not in decode.collectives or (
        decode.collectives["all-gather"].bytes_run < turns * decode.holds["weights"] / 10
    ), "no weights are gathered for a token"


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2), (1, 8, 1)])
def test_on_eight_devices_no_parameter_of_all_layers_is_gathered_and_no_logits_of_all_answers_are_made(sizes):
    made = planned(mesh=MeshConfig(*sizes), **{"optimizer.micro_batch": 8})
    of = by_name(made)
    for name in ("score: student", "gradient: recovery", "update: recovery", "update: review"):
        module = Module(of[name].lower().compile().as_text())
        assert unwanted(module, of[name], made) == set()
        if name.startswith("update"):
            moved = sum(traffic.bytes_run for traffic in module.collectives().values())
            assert 0 < moved < 128 * 256, "norms and counts, no parameter"
        else:
            gathered = [dims for i in module.instructions() if i.opcode == "all-gather" for _, dims in i.arrays]
            assert 128 * 256 // sizes[2] in map(math.prod, gathered), "one layer's feed-forward is"


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1)])
def test_a_turn_of_decoding_under_fsdp_exchanges_two_numbers(sizes):
    """By the HLO for eight devices: how many answers go on, and the longest. Weights, cache and answers stay."""
    made = planned(**ALONE | {"mesh": MeshConfig(*sizes), "optimizer.micro_batch": 8, "rollout.concurrency": 0})
    module = Module(by_name(made)["decode"].lower().compile().as_text())
    once, twice = module.collectives(trips=1), module.collectives(trips=2)
    of_a_turn = {kind: (t.runs - once[kind].runs, t.bytes_run - once[kind].bytes_run) for kind, t in twice.items()}
    assert {kind: of for kind, of in of_a_turn.items() if of[0]} == {"all-reduce": (2, 2 * 4)}


def test_logits_of_all_answers_are_unwanted_where_they_are_more_than_a_chunk():
    made = planned()
    program = by_name(made)["score: student"]
    module = Module("ENTRY %main (p: f32[]) -> f32[] {\n  %logits = f32[1,512,1536]{2,1,0} custom-call(%p)\n}\n")
    assert unwanted(module, program, made) == {"f32[1,512,1536]"}
    assert unwanted(module, program, planned(**{"compute.logits_chunk": 512})) == set(), "so many are asked for"


@libtpu
def test_the_peak_is_residents_and_what_the_program_holds_and_adds(compiled):
    made, of, _ = compiled
    reports = [report for _, report in of.values()]
    resident = residents(made, [program for program, _ in of.values()])
    assert resident["optimizer"] == pytest.approx(2 * resident["parameters"], abs=64)
    assert resident["general_teacher"] == resident["specialised_teacher"] == resident["parameters"] // 2
    total = sum(resident.values())
    peaks = {report.name: peak(total, [report]).bytes for report in reports}
    assert vars(peak(total, reports)) == {
        "program": max(peaks, key=peaks.__getitem__), "bytes": max(peaks.values()), "refused": False,
    }  # fmt: skip
    added = {name: report.added + report.memory["temporaries"] for name, (_, report) in of.items()}
    gradient = of["gradient: recovery"][1].holds["gradient"]
    weights, state = (of["decode"][1].holds[kind] for kind in ("weights", "cache"))
    assert peaks["update: recovery"] == total + of["update: recovery"][1].holds["gradient"] + added["update: recovery"]
    assert peaks["gradient: recovery"] == total + gradient + added["gradient: recovery"]
    assert peaks["score: student"] == total + added["score: student"]
    layer = weights - of["reshard: layers"][1].holds["weights"]
    assert 0 < layer < weights / LAYERS
    assert peaks["reshard: layers"] == total + weights - layer + added["reshard: layers"]
    assert peaks["decode"] == total + weights + state + added["decode"]
    assert peaks["refill"] == total + weights + state + added["refill"], "the other answers wait"
    cache = of["decode"][0].args[2].cache
    one = chip_bytes(cache.keys[0])
    assert chip_bytes((cache.keys, cache.values)) == 2 * LAYERS * one
    assert one == 1 * 128 * 2 * 640 * 2, "1 head, 2 of 8 lanes, 640 slots"
    shorter = one * (128 + 256) // 640
    assert peaks["grow"] == total + weights + state - one + shorter + added["grow"] and added["grow"] >= one


@pytest.mark.parametrize("schedule, rows", [("alternate", 16), ("mixed", 12 + 4)])
def test_a_residual_stream_lies_there_from_the_answers_to_the_gradient(schedule, rows):
    changes = {"rollout.concurrency": 0, "rollout.student_logprobs": "sampler", "compute.remat": "rollout"}
    made = planned(method=Method(schedule=schedule), **BFLOAT16, **changes)
    of = by_name(made)
    stream = rows // 4 * 640 * 128 * 2 * (LAYERS + 1)  # four shards, slots, width, bfloat16

    def waits(name):
        return of[name].holds["residuals"]

    assert waits("gradient: review") == waits("score: review teacher") == waits("select: review") == stream
    first = stream if schedule == "alternate" else stream * 12 // 16
    assert waits("score: recovery teacher") == waits("select: recovery") == first
    state = of["decode"].args[2].cache.residuals
    assert len(state) == LAYERS + 1 and state[0].shape == (max(made.setup.rows.values()), 640, 128)
    assert not any(waits(name) for name in of if name.startswith(("update", "score: none")))
    if schedule == "alternate":
        assert not any(waits(name) for name in of if name.startswith(("prefill", "reshard")))
    lowered = of["gradient: review"].lower().as_text()
    assert lowered.count("x640x128xbf16>") > 0


@pytest.mark.parametrize("when", ["ahead", "late"])
def test_what_waits_in_host_memory_is_there_for_its_stage_alone(when):
    made = planned(ModelShapes({"general": DEEPER, "specialised": MODEL}), **BFLOAT16, **{"compute.offload": when})
    several = programs(made)
    resident = residents(made, several)
    assert sum(resident.values()) == resident["parameters"] + resident["answers"] > 0
    offloaded = {program.name: program.holds["offloaded"] for program in several}
    general, own = (chip_bytes(params) for _, params in made.teachers.values())
    assert general > own
    assert offloaded["decode"] == offloaded["score: student"] == offloaded["score: recovery teacher"] == general
    assert offloaded["score: review teacher"] == own and offloaded["select: review"] == 0
    moments = chip_bytes(made.state.moments)
    assert offloaded["update: review"] == moments > 2 * own
    assert offloaded["gradient: recovery"] == {"ahead": moments, "late": 0}[when]


def test_a_teacher_of_no_acting_branch_stays_where_it_was_loaded():
    branches = {"recovery": BranchConfig(), "review": BranchConfig(teacher="specialised", steps=0)}
    made = planned(branches=branches, **{"compute.offload": "late"})
    resident = residents(made, programs(made))
    assert resident["general_teacher"] == 0
    assert resident["specialised_teacher"] == chip_bytes(made.teachers["specialised"][1])
    assert "update: review" not in by_name(made)


def test_a_step_on_shapes_is_the_runs_own(tmp_path):
    """Against a rollout that answers: the state after it grew to the cap, and the weights that it answered with."""
    config = changed(CONFIG, {
        "mesh": MeshConfig(1, 8, 1), "optimizer.micro_batch": 8, "rollout.mesh.tensor": 2, "rollout.concurrency": 0,
        "rollout.max_prompt_tokens": 8, "rollout.max_response_tokens": 6,
    })  # fmt: skip
    made = plan(config, ModelShapes(MODELS.shapes), jax.devices())
    decode = by_name(made)["decode"]
    model, weights, state, _ = decode.args
    params = jax.jit(made.student.init, out_shardings=jax.tree.map(lambda s: s.sharding, made.params))(
        jax.random.key(0)
    )
    moved = generate.for_decoding(model, params)

    def alike(ours, theirs):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, theirs.ndim), (ours.sharding, theirs.sharding)

    jax.tree.map(alike, weights, moved)
    assert weights["head"].sharding.shard_shape((128, VOCAB)) == (128, VOCAB // 2)
    seen = []
    original = generate._grow
    run = method.Programs(made.setup, made.student, params, (), made.state, {n: made.student for n in config.branches})
    prompts = Prompts(np.ones((16, 8), np.int32), np.full(16, 8, np.int32))
    keys = jax.jit(row_keys, static_argnums=0)(0, np.int32(0), np.arange(16, dtype=np.int32))
    try:
        generate._grow = lambda *args: seen.append(original(*args)) or seen[-1]
        answers = generate.answers(model, moved, global_rows(made.setup.mesh, prompts, 16), keys, run.decode)
    finally:
        generate._grow = original
    kept = jax.tree.map(lambda array: (array.shape, array.dtype), (seen[-1].cache, seen[-1].tokens))
    assert jax.tree.map(lambda s: (s.shape, s.dtype), (state.cache, state.tokens)) == kept
    jax.tree.map(alike, by_name(made)["update: recovery"].args[2].rollout, run.move_answers(answers))


@pytest.mark.slow
@pytest.mark.parametrize(
    "types, fields, expected",
    [
        (
            ["sliding_attention"] * 2 + ["full_attention"],
            dict(hidden_size_per_layer_input=0),
            {"": 2, " (global_attention)": 1},
        ),
        (
            ["sliding_attention", "full_attention"] * 2,
            dict(num_kv_shared_layers=2, hidden_size_per_layer_input=8, use_double_wide_mlp=True),
            dict.fromkeys(["", *(f" ({name}attention)" for name in ("global_", "sharing_", "sharing_global_"))], 1),
        ),
    ],
)
def test_layers_of_several_kinds_move_by_a_program_each(types, fields, expected):
    """Gemma 4, with layers without a window and with those of others' keys: the weights that answer are the model's."""
    text = FIELDS | dict(model_type="gemma4_text", head_dim=64, global_head_dim=128, tie_word_embeddings=True)
    model = from_hf(text | dict(num_hidden_layers=len(types), layer_types=types) | fields)
    made = planned(ModelShapes({"general": model, "specialised": model}, (2,)))
    of = by_name(made)
    runs = {name: program.runs for name, program in of.items() if name.startswith("reshard: layers")}
    assert runs == {f"reshard: layers{kind}": count for kind, count in expected.items()}
    ours = jax.tree.map(lambda s: (s.shape, s.dtype), of["decode"].args[1])
    assert ours == jax.tree.map(lambda s: (s.shape, s.dtype), jax.eval_shape(made.student.for_decoding, made.params))


@libtpu
def test_a_mesh_that_cuts_a_side_of_the_torus_is_laid_out():
    devices = topology.describe("v5p:4x4x4").devices
    assert make_mesh(1, 32, 2, devices=devices).devices.shape == (1, 32, 2)


def first_of_each(made):
    """{name: the first program that is compiled to the same}"""
    first = {}
    return {program.name: first.setdefault(program.key, program.name) for program in programs(made)}


def test_programs_of_the_same_shapes_are_compiled_once():
    first = first_of_each(planned())
    assert (
        first["score: review teacher"] == "score: recovery teacher"
        and first["gradient: review"] == "gradient: recovery"
    )
    assert [name for name, same in first.items() if name == same] == [
        "reshard: embedding", "reshard: head", "reshard: final_norm", "reshard: layers", "prefill", "grow", "refill",
        "decode", "score: recovery teacher", "score: student", "select: recovery", "gradient: recovery",
        "update: recovery", "select: review", "update: review",
    ]  # fmt: skip


def test_a_mixed_step_whose_teachers_answer():
    short = RolloutConfig(batch_size=8, max_prompt_tokens=128, max_response_tokens=256)
    branches = {name: dataclasses.replace(of, objective="cross_entropy") for name, of in CONFIG.branches.items()}
    other = from_hf(FIELDS | {"num_hidden_layers": 2, "num_key_value_heads": 4, "vocab_size": VOCAB + 128})
    made = planned(
        ModelShapes({"general": other, "specialised": other}), mesh=MeshConfig(1, 2, 4), rollout=short,
        branches=branches, method=Method(schedule="mixed", answers="teacher"), evaluation=Evaluation(batch_size=8),
    )  # fmt: skip
    of = by_name(made)
    assert "refill" not in of and made.setup.rows == {"recovery": 6, "review": 2}
    assert of["decode: recovery teacher"].args[2].row.shape == (6,) and of["decode: review teacher"].args[
        2
    ].row.shape == (2,)
    assert list(of)[-1] == "update: mixed" and of["score: student"].runs == 2
    assert (of["gradient: recovery"].runs, of["score: recovery teacher"].runs) == (1, 2), "6 of 8 rows, by fours"
    one = chip_bytes(of["gradient: recovery"].args[2])
    assert of["update: mixed"].holds["gradient"] == 2 * one
    assert of["gradient: review"].holds["gradient"] > 2 * one


def test_sampling_with_the_teacher_holds_both_models():
    """Weights and cache of the student and of a deeper teacher, in shapes and in numbers; and MiniLLM's constants."""
    models = ModelShapes({"general": DEEPER, "specialised": MODEL}, (2,))
    branches = {name: dataclasses.replace(of, objective="minillm") for name, of in CONFIG.branches.items()}
    rollout = dataclasses.replace(CONFIG.rollout, sampler="mixed")
    plain, paired = planned(models), planned(models, branches=branches, rollout=rollout)
    of, both = by_name(plain), by_name(paired)
    held, alone = both["decode"].holds, of["decode"].holds
    share = DEEPER.num_layers / MODEL.num_layers
    positions = 4 * 640 * 8 / 4  # int32, of 8 lanes on 4 groups of devices
    assert held["cache"] - alone["cache"] == pytest.approx(share * (alone["cache"] - positions) + positions, rel=0.01)
    assert held["weights"] > 2 * alone["weights"]
    assert "reshard: recovery teacher: layers" in both and "prefill" in both and "refill" in both
    layers = both["reshard: recovery teacher: layers"].holds["weights"]
    assert layers > of["reshard: layers"].holds["weights"] + alone["weights"], "the student's are there too"
    assert list(both["gradient: recovery"].args[3].record) == ["hidden", "importance", "long_term"]
    one, two = (memory_estimate(made.setup, models) for made in (plain, paired))
    assert two["update"] == one["update"]
    of_teacher = bytes_on_chip(DEEPER, paired.setup.rollout_mesh, paired.setup.dtype)
    assert all(two[name] - one[name] > of_teacher for name in ("prefill", "refill", "decode"))
    work = [step_work(made.setup, models, 512) for made in (plain, paired)]
    assert work[1]["decode"].flops > 2 * work[0]["decode"].flops and "score student" in work[1]


def test_the_record_of_top_k_objectives_and_token_weights():
    branches = {
        "recovery": BranchConfig(objective="binned_top_k(k=3)", weights=("iw_opd",)),
        "review": BranchConfig(teacher="specialised", weights=("uc_mopd",)),
    }
    of = by_name(planned(branches=branches))
    records = {name: of[f"gradient: {name}"].args[3].record for name in branches}
    assert {name: array.shape[2:] for name, array in records["recovery"].items()} == {
        "top_ids": (3,), "top_log_probs": (3,), "rest": ()
    }  # fmt: skip
    assert list(records["review"]) == ["entropy"]


@pytest.mark.slow
def test_the_second_pass_of_the_student():
    """Its program reads the teacher's values, and what it stores is held until the gradient; its time counts too."""
    branches = {
        "recovery": BranchConfig(objective="adakd"),
        "review": BranchConfig(objective="tide(k=3)", teacher="specialised"),
    }
    made = planned(branches=branches)
    of = by_name(made)
    adakd, tide = of["score: recovery student"], of["score: review student"]
    assert list(adakd.args[5].tokens) == ["hidden"] and list(adakd.args[5].head) == ["head"]
    assert list(adakd.args[2]) == ["difficulty", "log_prob"] and list(tide.args[2]) == ["deficit", "log_prob"]
    records = {name: of[f"gradient: {name}"].args[3].record for name in branches}
    assert set(records["recovery"]) == {"hidden", "difficulty", "kept", "log_temperature"}
    assert set(records["review"]) == {"top_ids", "top_log_probs", "deficit", "excess", "lacking"}
    rows_of_chip = 16 // 4 * 512
    assert of["gradient: review"].holds["record"] == rows_of_chip * (2 * 3 + 1) * 4
    assert of["score: review teacher"].holds["record"] == rows_of_chip * 2 * 3 * 4
    state = of["update: recovery"].args[0]
    assert list(state.objectives) == ["recovery"] and state.objectives["recovery"]["token_share"].shape == ()
    without = planned(branches={name: BranchConfig(teacher=of.teacher) for name, of in branches.items()})
    work, less = (step_work(one.setup, MODELS, 512) for one in (made, without))
    assert "score student" in work and "score student" not in less, "in float32 the sampler's are used"


THREE = {
    "recovery": BranchConfig(objective="reverse_kl", steps=3),
    "review": BranchConfig(teacher="specialised"),
    "law": BranchConfig(teacher="/models/law", objective="jsd(beta=0.3)"),
}


def test_three_branches_with_three_teachers_and_whole_distributions(capsys):
    """Nothing in the plan knows of it: teachers' hidden states and heads are in the shapes."""
    models = ModelShapes({"general": DEEPER, "specialised": MODEL, "/models/law": MODEL}, (2,))
    made = planned(models, branches=THREE, **BFLOAT16)
    of = by_name(made)
    resident = residents(made, list(of.values()))
    assert list(resident) == [
        "parameters", "general_teacher", "specialised_teacher", "/models/law_teacher", "optimizer", "answers",
    ]  # fmt: skip
    assert resident["general_teacher"] > resident["/models/law_teacher"] == resident["specialised_teacher"]
    hidden = 16 // 4 * 512 * 128 * 2  # rows of a shard, answer, width, bfloat16
    for branch in ("recovery", "law"):
        for name in (f"score: {branch} teacher", f"select: {branch}", f"gradient: {branch}"):
            assert of[name].holds["record"] == hidden, name
        inputs, head = of[f"gradient: {branch}"].args[3:5]
        assert inputs.record["hidden"].shape == (16, 512, 128) and list(head) == ["head"]
    assert of["gradient: review"].holds["record"] == 0 and of["gradient: review"].args[4] == {}
    assert of["update: recovery"].holds["record"] == 0
    late = planned(models, branches=THREE, **BFLOAT16, **{"compute.offload": "late"})
    head = chip_bytes(late.teachers["general"][1]["head"])
    assert by_name(late)["gradient: recovery"].holds["record"] == hidden + head, "its copy stays"
    alone = planned(models, devices=1, branches=THREE, **ALONE)
    several = [by_name(alone)[name] for name in ("score: recovery teacher", "gradient: recovery", "gradient: law")]
    reports = [compile_program(program) for program in several]
    assert all(report.refused is None and report.memory["temporaries"] > 0 for report in reports)
    assert len({program.key for program in several}) == 3, "each objective has its own"


def test_what_is_frozen_makes_a_plan_smaller():
    rule = {"optimizer.trained": r"mlp\."}
    every, some = planned(devices=1, **ALONE), planned(devices=1, **ALONE, **rule)
    assert chip_bytes(every.params) == chip_bytes(some.params)
    trained = LAYERS * 3 * 128 * 256 * 4
    assert chip_bytes(some.state.params) == trained
    assert 2 * trained <= chip_bytes(some.state.moments) < 2 * trained + 64
    gradient = by_name(some)["gradient: recovery"].holds["gradient"]
    assert trained < gradient < trained + 2**14
    names, peaks = ("gradient: recovery", "update: recovery"), []
    for made in (every, some):
        of = by_name(made)
        resident = sum(residents(made, list(of.values())).values())
        peaks.append([peak(resident, [compile_program(of[name])]).bytes for name in names])
    frozen = chip_bytes(every.params) - trained
    assert all(less <= more - 3 * frozen for more, less in zip(*peaks, strict=True)), "no moments and no gradient"


def test_bytes_on_a_chip():
    params = abstract_params(planned().student, make_mesh(1, 4, 2), "float32")
    norms = 128 * (2 * LAYERS + 1)  # complete on every chip
    split = LAYERS * (128 * 128 * (4 + 2 + 2 + 4) + 3 * 128 * 256) + 2 * VOCAB * 128
    assert chip_bytes(params) == 4 * (norms + split // 8)
    assert chip_bytes({"model": MODEL, "params": params}) == chip_bytes(params)


def test_what_the_compiler_says_of_too_much():
    text = ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (29.97G) exceeds available HBM (15.75G). HLO module: jit_score.\nSee elsewhere")  # fmt: skip
    assert refusal(text)[1] == pytest.approx(29.97 * 2**30) and "See" not in refusal(text)[0]
    assert refusal("RESOURCE_EXHAUSTED: Used 20.5M of 15.75M hbm")[1] == 20.5 * 2**20
    assert refusal("RESOURCE_EXHAUSTED: no number")[1] == 0


@libtpu
def test_a_program_that_the_compiler_refuses_does_not_fit():
    where = topology.describe("v5e:2x4")
    config = changed(
        CONFIG, {"compute.remat": "dots", "rollout.max_response_tokens": 2**14, "optimizer.micro_batch": 16}
    )
    wide = from_hf(FIELDS | {"intermediate_size": 2**16, "num_hidden_layers": 12})
    made = plan(config, ModelShapes({"general": wide, "specialised": wide}), where.devices)
    report = compile_program(by_name(made)["gradient: recovery"])
    assert "Ran out of memory" in report.refused and report.memory["temporaries"] > where.hbm
    high = peak(0, [report, dataclasses.replace(report, refused=None, memory={"temporaries": 2**50})])
    assert high.refused and not high.fits(2**60) and high.bytes > where.hbm
    assert report.collectives["all-gather"].runs > 0, "what it would have done is known"


def test_a_persistent_compilation_cache_changes_nothing(tmp_path):
    """A program that is read from it comes without its text, so with no collectives, on some platforms."""
    program = by_name(planned())["update: recovery"]
    before, folder = compile_program(program), jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    try:
        jax.jit(lambda x: x + 1)(np.float32(1))
        cached = len(list(tmp_path.iterdir()))
        again = [compile_program(program) for _ in range(2)]
        assert len(list(tmp_path.iterdir())) == cached > 0, "a run's programs are cached, a plan's are not"
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()
    assert before.collectives["all-reduce"].runs > 0
    for report in again:
        assert (report.collectives, report.memory) == (before.collectives, before.memory)


@pytest.mark.slow
def test_the_command_on_this_machine(command, tmp_path):
    """All of it, on the CPU's own compiler: quick, and without libtpu."""
    quick = ROOT / "configs" / "quickstart.py"
    ended = command("plan", f"--config={quick}", "--topology=local", "--hbm-gib=1", f"--json={tmp_path / 'plan.json'}",
                    "--config.rollout.max_response_tokens=16", "--config.branches.recovery.objective=reverse_kl",
                    devices=2)  # fmt: skip
    assert ended.code == 0, ended.err
    assert "it fits" in ended.out and max(map(len, ended.out.splitlines())) <= 120
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1} and result["fits"] is True
    assert result["residents"]["parameters"] * 2 == pytest.approx(result["residents"]["optimizer"], abs=64)
    update = next(p for p in result["programs"] if p["name"] == "update: recovery")
    assert update["memory"]["aliased"] > 0 and update["collectives"]["all-reduce"]["runs"] > 0
    score = next(p for p in result["programs"] if p["name"] == "score: recovery teacher")
    assert score["holds"]["record"] > 0, "hidden states of the teacher"


@pytest.mark.parametrize(
    "name, says",
    [("v5e:8", "2 sides"), ("v5e:32x32", "1 to 16"), ("v7:2x2", "give local, or a slice"), ("8x8", "give local"),
     ("v5p:2x2", "3 sides"), ("v5e:0x4", "1 to 16")],
)  # fmt: skip
def test_a_topology_that_is_none(name, says):
    with pytest.raises(UserError, match=says):
        topology.check_name(name)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        topology.describe("v5e:2x4")


def test_mistakes_are_one_line_and_exit_code_2(command):
    quick = f"--config={ROOT / 'configs' / 'quickstart.py'}"
    for args, says in [
        ([quick], "--topology is missing"),
        ([quick, "--topology=v5e:3"], "2 sides"),
        ([quick, "--topology=local", "--general_config=qwen9"], "neither a file, a folder nor a known shape"),
        ([quick, "--topology=local", "--config.mesh.tensor=3"], "needs 3 devices"),
        ([quick, "--topology=local", "--config.optimizer.trained=lora"], "which matches no parameter name"),
        ([quick, "--topology=local", "--search"], "give --hbm_gib"),
        ([quick, "--topology=local", "--programs=rollout"], "give some of reshard"),
    ]:
        ended = command("plan", *args, devices=2)
        assert ended.code == 2 and says in ended.err and len(ended.err.strip().splitlines()) == 1, (args, ended.err)


def test_config_files_and_names_of_shapes_stand_in_for_the_models(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(dict(model_type="llama", vocab_size=9, hidden_size=8, intermediate_size=8,
                                    num_hidden_layers=1, num_attention_heads=2, eos_token_id=[3, 4])))  # fmt: skip
    law = tmp_path / "law"
    law.mkdir()
    (law / "config.json").write_text(json.dumps(SHAPES["tiny"]))
    branches = CONFIG.branches | {"law": BranchConfig(teacher=str(law))}
    config = dataclasses.replace(CONFIG, general_model="nobody/nothing", branches=branches)
    models = read_models(config, "qwen3-8b", str(file))
    assert models.shapes["general"].num_layers == 36 and models.student.vocab_size == 9 and models.eos_ids == (3, 4)
    assert models.shapes[str(law)].hidden_size == 64
    with pytest.raises(UserError, match=r"config\.branches\.law\.teacher"):
        read_models(changed(config, {"branches": {"law": BranchConfig(teacher="/no/law")}}), "tiny", "tiny")


def test_the_search_ends_in_flags(capsys):
    where = topology.describe("local", hbm_gib=1.0)
    config = changed(CONFIG, {"rollout.max_response_tokens": 16})

    def search(where):
        return look_for(Request(config, MODELS, where, 16, ("score",), Console(width=120)), tries=1)

    result = search(where)
    printed = " ".join(capsys.readouterr().out.split())
    assert result["recommended"][:4] == [
        "--config.mesh.data=1",
        "--config.mesh.fsdp=4",
        "--config.mesh.tensor=2",
        "--config.rollout.mesh.tensor=2",
    ], "without a speed, what needs least memory"
    assert all(flag in printed for flag in result["recommended"])
    result = search(dataclasses.replace(where, hbm=1e3))
    assert result["recommended"] is None and "nothing that was tried fits" in capsys.readouterr().out
