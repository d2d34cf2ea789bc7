"""The command `train` with the quickstart's models: its files, kills and damaged checkpoints."""

import shutil
import signal

import numpy as np
import pytest
import torch
import transformers
from documented import documented_keys
from quickstart import QUICKSTART, SMALL, STEPS, checkpoints, one_line, same_weights
from rows import read_lines, write_lines
from safetensors.numpy import load_file

from camopd_jax.method.agreement import MONITORS

KEYS = """
step phase loss gap_mean gap_abs_mean gap_pos_mean selected_fraction selected_mass selected_length_mean
length_mean truncated_fraction repetition entropy sampler_gap grad_norm grad_clipped learning_rate
prompt_tokens response_tokens seconds tokens_per_second memory_gib skipped
""".split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, command):
    """An uninterrupted run: (work directory, how it ended)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    ended = command("train", f"--workdir={workdir}", *SMALL, "--config.log.report=true")
    assert ended.code == 0, ended.err
    return workdir, ended


def test_the_files_of_a_run(whole):
    workdir, ended = whole
    assert {p.name for p in workdir.iterdir()} == {
        "config.json", "lock", "metrics.jsonl", "samples.jsonl", "selection.jsonl", "checkpoints", "tensorboard",
        "export", "report.html",
    }  # fmt: skip
    metrics = read_lines(workdir / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(STEPS))
    assert [m["phase"] for m in metrics] == (["recovery"] * 3 + ["review"]) * 2
    for row in metrics:
        assert set(row) | {"sampler_gap"} == set(KEYS)
        assert set(row["seconds"]) == {"rollout", "score", "select", "update", "other"}
        assert row["skipped"] == 0 and 0 < row["selected_fraction"] <= 1
        assert ("sampler_gap" in row) == (row["step"] == 0) and row.get("sampler_gap", 0) < 1e-4
        assert all(isinstance(row[name], int) for name in ("prompt_tokens", "response_tokens", "skipped"))
    assert all(m["gap_abs_mean"] > 0.3 for m in metrics if m["phase"] == "recovery")
    assert checkpoints(workdir) == [3, 6, 8]
    assert list((workdir / "tensorboard").glob("events.*"))
    assert (
        f"step {STEPS}/{STEPS} review" in ended.out
        and "exported: " in ended.out
        and "report: " in ended.out
        and not ended.err.strip()
    )


@pytest.mark.parametrize("name", ["metrics", "samples", "selection"])
def test_the_keys_of_a_file_are_those_documented(whole, name):
    written = {key for row in read_lines(whole[0] / f"{name}.jsonl") for key in row}
    adapted = {"token_share", "loss_average", "loss_reference"}
    optional = {*MONITORS, "balance", *adapted} if name == "metrics" else set()
    assert documented_keys(name) == written | optional


def test_samples_have_the_gap_of_every_token(whole):
    samples = read_lines(whole[0] / "samples.jsonl")
    assert len(samples) == 2 * STEPS
    for row in samples:
        assert len(row["tokens"]) == len(row["gaps"]) == len(row["logprobs"])
        np.testing.assert_allclose(row["logprobs"], row["sampler_logprobs"], atol=1e-3)
        assert "".join(row["tokens"]) == row["response"]
        assert row["prompt"].startswith("<|user|>") and row["finish_reason"] in ("stop", "length")
        assert (row["tokens"][-1] == "<|end|>") == (row["finish_reason"] == "stop")


def test_selection_has_every_answer(whole):
    metrics, rows = (read_lines(whole[0] / f"{name}.jsonl") for name in ("metrics", "selection"))
    samples = read_lines(whole[0] / "samples.jsonl")
    assert len(rows) == STEPS
    for step, row in zip(metrics, rows, strict=True):
        assert (row["step"], row["phase"]) == (step["step"], step["phase"])
        assert {len(column) for column in row.values() if isinstance(column, list)} == {16}
        assert np.mean(row["selected"]) == pytest.approx(step["selected_fraction"])
        assert np.mean(row["length"]) == pytest.approx(step["length_mean"])
        assert np.mean(row["truncated"]) == pytest.approx(step["truncated_fraction"])
        assert np.mean(row["entropy"]) == pytest.approx(step["entropy"], abs=1e-3)
        first = next(sample for sample in samples if sample["step"] == step["step"])
        assert (first["prompt_index"], first["selected"]) == (row["index"][0], row["selected"][0])
        assert row["student_loss"][0] == pytest.approx(-np.mean(first["logprobs"]), abs=1e-3)
        gap = np.asarray(first["gaps"])
        wanted = np.abs(gap).mean() if step["phase"] == "recovery" else np.maximum(gap, 0).mean()
        assert row["score"][0] == pytest.approx(wanted, abs=1e-3)
        assert row["student_loss"][0] - row["teacher_loss"][0] == pytest.approx(gap.mean(), abs=1e-3)


@pytest.mark.slow
def test_diagnostics_do_not_change_the_run_and_resume_after_a_kill(whole, command, tmp_path):
    workdir, file = tmp_path / "run", tmp_path / "run" / "diagnostics.jsonl"
    flags = [*SMALL, "--config.diagnostics.every=4", "--config.diagnostics.rows=8"]
    seen = lambda: file.exists() and len(file.read_text().splitlines()) == 2  # noqa: E731
    command.start("train", f"--workdir={workdir}", *flags).when(seen, signal.SIGKILL)
    before = read_lines(file)
    ended = command("train", f"--workdir={workdir}", *flags)
    assert ended.code == 0, ended.err
    rows = read_lines(file)
    assert [row["step"] for row in rows] == [0, 4, 8] and rows[0] == before[0] and rows[1] == before[1]
    same_weights(whole[0], workdir)
    assert rows[0]["branches"]["review"]["signal"]["all"] == 0, "before the first step there is nothing to review"
    assert (
        0 < rows[1]["branches"]["review"]["coherence"]["all"] <= 1 and -1 <= rows[1]["conflict"]["all"]["cosine"] <= 1
    )
    assert list(rows[1]["layers"]) == ["embedding", "final_norm", "layer 0", "layer 1", "layer 2"]


@pytest.mark.slow
def test_analyze_a_run(whole, command, tmp_path):
    out = tmp_path / "x.jsonl"
    ended = command("analyze", f"--checkpoint={whole[0]}", "--source_field=skill", f"--out={out}", *SMALL,
                    "--config.diagnostics.rows=8", "--config.diagnostics.sketch=255")  # fmt: skip
    assert ended.code == 0, ended.err
    (row,) = read_lines(out)
    assert row["step"] == STEPS and row["checkpoint"] == str(whole[0]) and row["sketch"] == 255
    assert row["training"]["recovery"]["steps"] == 6 and row["training"]["review"]["steps"] == 2
    assert set(row["training"]["recovery"]["by_source"]) == {"reverse", "sort", "shift", "add"}
    assert "by_source" not in row["training"]["review"] and "source: add" in row["training"]["recovery"]["correlations"]
    headings = (
        "Gradients of 8 answers a branch, after 8 steps",
        "The gradients of recovery and review against each other",
        "cosine",
        "Rank correlation of an answer's gap mass with",
        "What was selected over the run",
    )
    for words in headings:
        assert words in ended.out
    assert max(map(len, ended.out.splitlines()[1:])) <= 80  # the first line names the folder of the cache


def test_the_export_gives_the_same_answers_in_transformers(whole, command, tmp_path):
    folder = whole[0] / "export"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (
        "CaMOPD" in (folder / "README.md").read_text()
        and (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044
    )
    questions = read_lines(QUICKSTART / "eval_covered.jsonl")[:6] + read_lines(QUICKSTART / "eval_domain.jsonl")[:6]
    write_lines(tmp_path / "x.jsonl", [{"messages": q["messages"]} for q in questions])
    out = tmp_path / "y.jsonl"
    ended = command(
        "generate", f"--model={folder}", f"--input={tmp_path / 'x.jsonl'}", f"--output={out}", "--max_new_tokens=32"
    )
    assert ended.code == 0, ended.err
    for row in read_lines(out):
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([[*prompt, *row["response_ids"]]])
        with torch.no_grad():
            logp = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1)
        assert logp.argmax(-1).tolist() == row["response_ids"]
        np.testing.assert_allclose(row["logprobs"], logp.max(-1).values, atol=1e-4)
        assert row["response"] == tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        assert row["finish_reason"] == ("stop" if row["response_ids"][-1] == tokenizer.eos_token_id else "length")


@pytest.mark.parametrize("moment", [pytest.param("between", marks=pytest.mark.slow), "while saving"])
def test_killed_and_started_again_gives_the_same_bits(whole, command, tmp_path, moment):
    workdir = tmp_path / "run"
    seen = {
        "between": lambda: len((workdir / "metrics.jsonl").read_text().splitlines()) >= 5,
        "while saving": lambda: (
            any((workdir / "checkpoints").glob("6*tmp*")) or (workdir / "checkpoints" / "6").exists()
        ),
    }

    def reached():
        return (workdir / "metrics.jsonl").exists() and seen[moment]()

    ended = command.start("train", f"--workdir={workdir}", *SMALL).when(reached, signal.SIGKILL)
    assert ended.code == -signal.SIGKILL and not (workdir / "export").exists()
    ended = command("train", f"--workdir={workdir}", *SMALL)
    assert ended.code == 0, ended.err
    assert "continuing from step" in ended.out
    same_weights(workdir, whole[0])
    assert [m["step"] for m in read_lines(workdir / "metrics.jsonl")] == list(range(STEPS))
    ours, theirs = (read_lines(w / "samples.jsonl") for w in (workdir, whole[0]))
    assert ours == theirs


def test_sigterm_saves_and_exits_cleanly(whole, command, tmp_path):
    workdir = tmp_path / "run"

    def stepped():
        return (workdir / "metrics.jsonl").exists() and len((workdir / "metrics.jsonl").read_text().splitlines()) >= 1

    ended = command.start("train", f"--workdir={workdir}", *SMALL).when(stepped, signal.SIGTERM)
    assert ended.code == 0, ended.err
    assert "stopped by a signal: saved at step" in ended.out
    saved = checkpoints(workdir)[-1]
    assert saved < STEPS and len(read_lines(workdir / "metrics.jsonl")) == saved
    assert command("train", f"--workdir={workdir}", *SMALL).code == 0
    same_weights(workdir, whole[0])


def test_a_finished_run_started_again_changes_nothing(whole, command, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    free = ["--config.optimizer.micro_batch=4", "--config.compute.remat=none", "--config.compute.offload=late"]
    assert command("train", f"--workdir={workdir}", *SMALL, *free).code == 0
    same_weights(workdir, whole[0])
    assert (workdir / "metrics.jsonl").read_text() == (whole[0] / "metrics.jsonl").read_text()


@pytest.mark.slow  # tests/test_meshes.py looks closer
def test_eight_devices_give_the_same_model(whole, command, tmp_path):
    mesh = [
        "--config.mesh.data=2",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        "--config.evaluation.batch_size=8",
    ]
    ended = command("train", f"--workdir={tmp_path / 'run'}", *SMALL, "--config.steps=4", *mesh, devices=8)
    assert ended.code == 0, ended.err
    for ours, theirs in zip(
        read_lines(tmp_path / "run/metrics.jsonl"), read_lines(whole[0] / "metrics.jsonl"), strict=False
    ):
        assert (
            ours["response_tokens"] == theirs["response_tokens"]
            and ours["selected_fraction"] == theirs["selected_fraction"]
        )
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-5)


def test_export_of_an_earlier_step(whole, command, tmp_path):
    out = tmp_path / "hf"
    ended = command("export", f"--workdir={whole[0]}", f"--out={out}", "--step=6")
    assert ended.code == 0, ended.err
    early, late = (load_file(f / "model.safetensors") for f in (out, whole[0] / "export"))
    assert any(not np.array_equal(early[name], late[name]) for name in early)
    again = command("export", f"--workdir={whole[0]}", f"--out={out}")
    assert again.code == 2 and "exists; give a new folder" in again.err
    none = command("export", f"--workdir={whole[0]}", f"--out={tmp_path / 'no'}", "--step=5")
    assert none.code == 2 and "no checkpoint 5 there, only [3, 6, 8]" in none.err


def test_a_workdir_of_another_run_and_another_teacher(whole, command, tmp_path):
    before = (whole[0] / "config.json").read_bytes()
    one_line(
        command("train", f"--workdir={whole[0]}", *SMALL, "--config.seed=3"),
        "belongs to a run with another config (config.seed)",
    )
    assert (whole[0] / "config.json").read_bytes() == before
    # The config's folder has other weights than those that the run started with.
    general = tmp_path / "general"
    shutil.copytree(QUICKSTART / "generalist", general)
    workdir, flags = tmp_path / "run", [*SMALL, f"--config.general_model={general}", "--config.steps=1"]
    assert command("train", f"--workdir={workdir}", *flags).code == 0
    shutil.copy(QUICKSTART / "specialist" / "model.safetensors", general)
    one_line(
        command("train", f"--workdir={workdir}", *flags), "its checkpoints were made with another general_fingerprint"
    )


@pytest.fixture
def spoilt_run(whole, tmp_path):
    """A copy of a run, and its last checkpoint, to be spoilt."""
    run = shutil.copytree(whole[0], tmp_path / "spoilt")
    return run, run / "checkpoints" / str(STEPS)


@pytest.mark.parametrize("part", ["ocdbt.process_0/d", "d"], ids=["arrays", "index"])
def test_a_truncated_checkpoint_is_one_line(command, spoilt_run, tmp_path, part):
    run, checkpoint = spoilt_run
    for file in (checkpoint / "state" / part).iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    ended = command("export", f"--workdir={run}", f"--out={tmp_path / 'out'}", devices=8)
    one_line(ended, f"{checkpoint}: this checkpoint cannot be read")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("item", ["provenance", "positions", "digests"])
@pytest.mark.parametrize("content", ["{}", pytest.param("[]", marks=pytest.mark.slow)])
def test_a_damaged_small_file_of_a_checkpoint(command, spoilt_run, tmp_path, item, content):
    run, checkpoint = spoilt_run
    (checkpoint / item / "metadata").write_text(content)
    ended = command("export", f"--workdir={run}", f"--out={tmp_path / 'out'}")
    one_line(ended, f"{checkpoint}: damaged on disk", "the run has checkpoints [3, 6, 8]: give another one")


def test_skipped_updates_are_counted_by_phase():
    """A sound review between recoveries that are skipped does not begin their count anew."""
    from camopd_jax.runs.run import Run

    run = object.__new__(Run)
    run._skipped = {}
    phases = [("recovery", True), ("review", False), ("recovery", True), ("recovery", False), ("recovery", True)]
    assert [run._count_skipped(*phase) for phase in phases] == [1, 0, 2, 0, 1]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole, command, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    shutil.rmtree(workdir / "checkpoints/8")
    largest = max(
        (f for f in (workdir / "checkpoints/6/state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    ended = command("train", f"--workdir={workdir}", *SMALL)
    assert ended.code == 0 and "damaged_checkpoint_6" in ended.out and "continuing from step 3" in ended.out
    same_weights(workdir, whole[0])


def test_clip_rates_by_phase():
    from camopd_jax.runs.training import clip_rates

    steps = [("recovery", 1.0), ("recovery", 0.0), ("review", 1.0)]
    metrics = [{"phase": phase, "grad_clipped": clipped} for phase, clipped in steps]
    assert clip_rates(metrics) == "gradients clipped: 50 % of recovery steps, 100 % of review steps"
    assert "cancels the branches' scales" in clip_rates(metrics[:1] + metrics[2:])
