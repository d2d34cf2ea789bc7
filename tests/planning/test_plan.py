"""The plan itself: a small run compiled by the TPU's compiler for chips that are not here, and by this machine's."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import pytest

from camopd_jax.config.schema import (
    Compute,
    Evaluation,
    MeshConfig,
    Method,
    Optimizer,
    RolloutConfig,
    Stream,
    TrainConfig,
)
from camopd_jax.errors import UserError
from camopd_jax.models.config import from_hf
from camopd_jax.planning import hlo, peak, topology
from camopd_jax.planning import report as command_plan
from camopd_jax.planning.arrays import Models, abstract_params, chip_bytes, decoding_params, decoding_state, plan
from camopd_jax.planning.compiling import compile_program, findings, largest, refusal
from camopd_jax.planning.programs import programs
from camopd_jax.runtime.mesh import make_mesh

ROOT = Path(__file__).parents[2]
LAYERS, VOCAB = 3, 1024
MODEL = from_hf(dict(model_type="llama", vocab_size=VOCAB, hidden_size=128, intermediate_size=256,
                     num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=128,
                     tie_word_embeddings=False))  # fmt: skip
CONFIG = TrainConfig(
    "g", "s", Stream("g"), Stream("d"),
    rollout=RolloutConfig(batch_size=16, max_prompt_tokens=128, max_response_tokens=512, places=8),
    optimizer=Optimizer(micro_batch=4), mesh=MeshConfig(1, 4, 2), evaluation=Evaluation(batch_size=8),
    compute=Compute(logits_chunk=64),
)  # fmt: skip
libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: .[plan]")


@pytest.fixture(scope="module")
def compiled():
    """The programs of a recovery on a v5e:2x4, where answers come from a mesh of 4 x 1 x 2."""
    where = topology.describe("v5e:2x4")
    made = plan(CONFIG, Models(MODEL, MODEL), where.devices, where.platform)
    unwanted = ("select", "update: review", "score: specialised", "prefill")  # the refill is a prefill of fewer rows
    found = {p.name: p for p in programs(made, (2,)) if not p.name.startswith(unwanted)}
    return made, where, {name: (p, compile_program(p, made, where)) for name, p in found.items()}


@libtpu
def test_the_compilers_arguments_are_those_of_shapes_and_shardings(compiled):
    made, _, of = compiled
    assert made.student.dtype == "bfloat16", "as on the chips, not as on this machine"
    for program, report in of.values():
        ours = sum(report.arguments.values())
        leaves = len(jax.tree.leaves(program.arguments))
        least = ours * 0.999  # an update does not read the prompts
        assert least <= report.memory.arguments <= ours + 1024 * leaves, "small arrays are padded"
        assert report.memory.code > 0 and report.refused is None
    params = of["score: student"][1].arguments["parameters"]
    assert of["score: general teacher"][1].arguments["teacher"] * 2 == params, "teachers are bfloat16"
    update, gradient, decode = (of[name][1] for name in ("update: recovery", "gradient", "decode"))
    donated = update.arguments["parameters"] + update.arguments["optimizer"]
    assert update.arguments["parameters"] == params and donated <= update.memory.aliased <= donated + 2**17
    for report in (update, gradient, decode):
        assert report.memory.outputs - report.memory.aliased < 2**17, "what is donated takes its old place"
    assert gradient.arguments["gradient"] == pytest.approx(params, abs=64) and gradient.memory.aliased >= params
    moves = {name: report.memory.outputs * report.runs for name, (_, report) in of.items() if "reshard" in name}
    assert sum(moves.values()) == pytest.approx(decode.arguments["weights"], rel=0.01), "what decoding takes"
    assert decode.arguments["weights"] == pytest.approx(2 * params, rel=0.01), "bfloat16, but whole over fsdp"


@libtpu
def test_parameters_are_gathered_by_the_layer_and_logits_by_the_chunk(compiled):
    _, _, of = compiled
    for _, report in of.values():
        assert report.findings == []
        assert [loop.trips for loop in report.counts.loops if loop.source.endswith("Decoder/while")] in ([], [LAYERS])
    score, gradient, decode = (of[name][1] for name in ("score: student", "gradient", "decode"))
    assert score.counts.collectives["all-gather"].count > 0 and score.counts.cycles > 0
    assert 6 * score.counts.flops > gradient.counts.flops > 3 * score.counts.flops, "forward, remat and backward"
    assert (score.runs, gradient.runs, of["refill"][1].runs) == (4, 4, 2), "16 rows, 13 kept, by fours; 8 of 16 wait"
    turns = 2 * CONFIG.rollout.max_response_tokens  # two waves
    assert decode.counts.guessed == [f"jit(advance)/while x {turns}"]
    assert "all-gather" not in decode.counts.collectives or (
        decode.counts.collectives["all-gather"].bytes_run < turns * decode.arguments["weights"] / 10
    ), "no weights are gathered for a token"


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2), (1, 8, 1)])
def test_on_eight_devices_no_parameter_of_all_layers_is_gathered_and_no_logits_of_all_answers_are_made(sizes):
    made = plan(dataclasses.replace(CONFIG, mesh=MeshConfig(*sizes), optimizer=Optimizer(micro_batch=8)),
                Models(MODEL, MODEL), jax.devices(), "cpu")  # fmt: skip
    wanted, seen = ("score: student", "gradient", "update: recovery", "update: review"), []
    for program in programs(made, (2,)):
        if program.name not in wanted:
            continue
        seen.append(program.name)
        module = hlo.Module(program.lower().compile().as_text())
        assert findings(module, program, made) == []
        if program.name.startswith("update"):
            moved = sum(traffic.bytes_run for traffic in module.counts().collectives.values())
            assert 0 < moved < 128 * 256, "norms and counts, no parameter"
        else:
            gathered = [dims for i in module.instructions() if i.opcode == "all-gather" for _, dims in i.arrays]
            assert 128 * 256 // sizes[2] in map(math.prod, gathered), "one layer's feed-forward is"
    assert sorted(seen) == sorted(wanted)


@libtpu
def test_the_peak_is_residents_and_what_the_program_holds_and_adds(compiled):
    made, _, of = compiled
    reports = [report for _, report in of.values()]
    there = peak.residents(made, reports)
    assert there.optimizer == pytest.approx(2 * there.parameters, abs=64)
    assert there.general_teacher == there.specialised_teacher == there.parameters // 2
    found = {p.program: p.bytes for p in peak.peaks(there, reports)}
    memory = {name: report.memory for name, (_, report) in of.items()}
    added = {name: m.outputs - m.aliased + m.temporaries for name, m in memory.items()}
    gradient = of["gradient"][1].arguments["gradient"]
    weights, state = (of["decode"][1].arguments[kind] for kind in ("weights", "cache"))
    assert found["update: recovery"] == there.total + gradient + added["update: recovery"]
    assert found["gradient"] == there.total + gradient + added["gradient"]
    assert found["score: student"] == there.total + added["score: student"]
    layer = weights - of["reshard: layers"][1].beside["weights"]
    assert found["reshard: layers"] == there.total + weights - layer + added["reshard: layers"]
    assert found["decode"] == there.total + weights + state + added["decode"]
    assert found["refill"] == there.total + weights + state + added["refill"], "the other answers wait"
    cache = peak.kv_cache(made)
    assert cache == 2 * LAYERS * 1 * 128 * 2 * 640 * 2, "keys and values, 1 head, 2 of 8 places, 640 slots"
    one = cache // (2 * LAYERS)
    shorter = one * (128 + 256) // 640
    assert found["grow"] == there.total + weights + state - one + shorter + added["grow"] and added["grow"] >= one


@pytest.mark.parametrize("schedule, rows", [("alternate", 16), ("mixed", 12 + 4)])
def test_a_residual_stream_lies_there_from_the_answers_to_the_gradient(schedule, rows):
    config = dataclasses.replace(
        CONFIG, method=Method(schedule=schedule), compute=Compute(remat="rollout"),
        rollout=dataclasses.replace(CONFIG.rollout, places=0, student_logprobs="sampler"),
    )  # fmt: skip
    made = plan(config, Models(MODEL, MODEL), jax.devices(), "tpu")
    found = {p.name: p for p in programs(made, ())}
    stream = rows // 4 * 640 * 128 * 2 * (LAYERS + 1)  # four shards, slots, width, bfloat16

    def waits(name):
        return sum(chip_bytes(of.get("residuals", ())) for of in (found[name].arguments, found[name].beside))

    assert waits("gradient") == waits("score: general teacher") == waits("select: review") == stream
    state = found["decode"].arguments["cache"].cache.residuals
    assert len(state) == LAYERS + 1 and state[0].shape == (made.rows, 640, 128)
    assert not any(waits(name) for name in found if name.startswith(("update", "prefill", "reshard")))
    lowered = found["gradient"].lower().as_text()
    assert lowered.count("x640x128xbf16>") > 0


@pytest.mark.parametrize("when", ["ahead", "late"])
def test_what_waits_in_host_memory_is_there_for_its_stage_alone(when):
    config = dataclasses.replace(CONFIG, compute=dataclasses.replace(CONFIG.compute, offload=when))
    made = plan(config, Models(MODEL, MODEL), jax.devices(), "tpu")
    there = peak.residents(made, [])
    assert there.total == there.parameters + there.answers
    beside = {p.name: chip_bytes(p.beside["offloaded"]) for p in programs(made, ())}
    teacher = chip_bytes(made.teachers["general"][1])
    assert beside["decode"] == beside["score: student"] == beside["score: general teacher"] == teacher
    moments = chip_bytes(made.state.moments)
    assert beside["update: review"] == moments > 2 * teacher
    assert beside["gradient"] == {"ahead": moments, "late": 0}[when]


def test_the_arrays_of_a_rollout_are_the_runs_own():
    """Shapes against those that prefill makes, places against those that the compiled moves leave: on other axes."""
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(1, 8, 1), optimizer=Optimizer(micro_batch=8),
                                 rollout=dataclasses.replace(CONFIG.rollout, mesh=MeshConfig(tensor=2)))  # fmt: skip
    made = plan(config, Models(MODEL, MODEL), jax.devices(), "cpu")
    of = {p.name: p for p in programs(made, (2,))}
    model = made.student.on(made.rollout_mesh)
    ours = decoding_params(model, made.state.params)
    for name, part in (ours | {"layers": ours["layers"][0]}).items():
        left = of[f"reshard: {name}"].lower().compile().output_shardings
        jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b, a.ndim) or pytest.fail(f"{a} {b}"), part, left)
    assert ours["head"].sharding.shard_shape((128, VOCAB)) == (128, VOCAB // 2)
    state = decoding_state(model, 8, 128, 0, 512)
    begun = of["prefill"].lower().out_info
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(lambda a: (a.shape, a.dtype), begun)
    assert state.cache.keys[0].sharding.shard_shape((8, 2, 128, 128)) == (2, 1, 128, 128)


@libtpu
def test_a_mesh_that_cuts_a_side_of_the_torus_is_laid_out():
    devices = topology.describe("v5p:4x4x4").devices
    assert make_mesh(1, 32, 2, devices=devices).devices.shape == (1, 32, 2)


def test_programs_of_the_same_shapes_are_compiled_once():
    made = plan(CONFIG, Models(MODEL, MODEL), jax.devices(), "tpu")
    same = {p.name: p.same_as for p in programs(made, ())}
    assert same["score: specialised teacher"] == "score: general teacher"
    assert [name for name, first in same.items() if first is None] == [
        "reshard: embedding", "reshard: final_norm", "reshard: head", "reshard: layers", "prefill", "refill", "grow",
        "decode", "score: student", "score: general teacher", "select: recovery", "select: review", "gradient",
        "update: recovery", "update: review",
    ]  # fmt: skip
    short = RolloutConfig(batch_size=8, max_prompt_tokens=128, max_response_tokens=256)
    mixed = dataclasses.replace(CONFIG, method=Method(schedule="mixed", answers="teacher"), mesh=MeshConfig(1, 2, 4),
                                rollout=short)  # fmt: skip
    other = from_hf(dict(model_type="llama", vocab_size=VOCAB + 128, hidden_size=128, intermediate_size=256,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4))  # fmt: skip
    made = plan(mixed, Models(other, other), jax.devices(), "cpu")
    of = {p.name: p for p in programs(made, ())}
    assert "refill" not in of and "grow" not in of and made.rows == 6
    assert of["decode: specialised teacher"].same_as == "decode: general teacher"
    assert of["decode: general teacher"].same_as is None
    assert list(of)[-1] == "update: mixed" and of["score: student"].runs == 3 and of["gradient"].runs == 3
    assert of["score: general teacher"].runs == 2, "6 of 8 rows, by fours"
    assert chip_bytes(of["gradient"].beside["gradient"]) == chip_bytes(of["gradient"].arguments["gradient"])


def test_bytes_on_a_chip():
    mesh = make_mesh(1, 4, 2)
    params = abstract_params(MODEL, mesh, "float32")
    norms = 128 * (2 * LAYERS + 1)  # whole on every chip
    split = LAYERS * (128 * 128 * (4 + 2 + 2 + 4) + 3 * 128 * 256) + 2 * VOCAB * 128
    assert chip_bytes(params) == 4 * (norms + split // 8)


def test_what_the_compiler_says_of_too_much():
    text = ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (29.97G) exceeds available HBM (15.75G). HLO module: jit_score.\nSee elsewhere")  # fmt: skip
    assert refusal(text)[1] == pytest.approx(29.97 * 2**30) and "See" not in refusal(text)[0]
    usage = """Memory Space: default (color=0)
Total bytes: 32181984768 (29.97GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
    6.75GiB( 14%);    6.75GiB;   7248297984;                17; bf16[16,36864,6144,1], pred[16,36864]
Memory Space: vmem (color=1)
    1.00MiB(100%);    1.00MiB;            0;                 1; bf16[8]
"""
    assert largest(usage) == ["6.75GiB: bf16[16,36864,6144,1], pred[16,36864]"]


@pytest.mark.slow
def test_the_command_on_this_machine(command, tmp_path):
    """The whole of it, on the CPU's own compiler: quick, and without libtpu."""
    quick = ROOT / "configs" / "quickstart.py"
    ended = command("plan", f"--config={quick}", "--topology=local", "--hbm-gib=1", f"--json={tmp_path / 'plan.json'}",
                    "--config.rollout.max_response_tokens=16", devices=2)  # fmt: skip
    assert ended.code == 0, ended.err
    assert "it fits" in ended.out and max(map(len, ended.out.splitlines())) <= 120
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1} and told["fits"] is True
    assert told["residents"]["parameters"] * 2 == pytest.approx(told["residents"]["optimizer"], abs=64)
    update = next(p for p in told["programs"] if p["name"] == "update: recovery")
    assert update["memory"]["aliased"] > 0 and update["counts"]["collectives"]["all-reduce"]["runs"] > 0


@pytest.mark.parametrize(
    "name, says",
    [("v5e:8", "2 sides"), ("v5e:32x32", "1 to 16"), ("v7:2x2", "give local, or one like"), ("8x8", "give local"),
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
        ([quick, "--topology=local", "--general_config=qwen9"], "no file or folder, and no shape"),
        ([quick, "--topology=local", "--config.mesh.tensor=3"], "needs 3 devices"),
        ([quick, "--topology=local", "--search"], "give --hbm_gib"),
        ([quick, "--topology=local", "--programs=rollout"], "give some of reshard"),
    ]:
        ended = command("plan", *args, devices=2)
        assert ended.code == 2 and says in ended.err and len(ended.err.strip().splitlines()) == 1, (args, ended.err)


def test_config_files_and_names_of_shapes_stand_in_for_the_models(tmp_path):
    config = dataclasses.replace(CONFIG, general_model="nobody/nothing")
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(dict(model_type="llama", vocab_size=9, hidden_size=8, intermediate_size=8,
                                    num_hidden_layers=1, num_attention_heads=2, eos_token_id=[3, 4])))  # fmt: skip
    models = command_plan.read_models(config, "qwen3-8b", str(file))
    assert models.general.num_layers == 36 and models.specialised.vocab_size == 9 and models.eos_ids == (3, 4)


def test_the_search_ends_in_flags(capsys):
    where = topology.describe("local", hbm_gib=1.0)
    config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, max_response_tokens=16))
    told = command_plan.look_for(config, Models(MODEL, MODEL), where, 16, 1, ("score",))
    printed = " ".join(capsys.readouterr().out.split())
    assert told["recommended"][:4] == [
        "--config.mesh.data=1",
        "--config.mesh.fsdp=4",
        "--config.mesh.tensor=2",
        "--config.rollout.mesh.tensor=2",
    ], "without a speed, what needs least memory"
    assert all(flag in printed for flag in told["recommended"])
    less = dataclasses.replace(where, hbm=1e3)
    told = command_plan.look_for(config, Models(MODEL, MODEL), less, 16, 1, ("score",))
    assert told["recommended"] is None and "nothing that was tried fits" in capsys.readouterr().out
