"""The command `train` with the quickstart's models: its files, kills and mistakes."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rows import add_tokens, edit_json, read_lines, swap_tokens, write_lines
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
STEPS = 8
SMALL = [
    f"--config={ROOT / 'configs/quickstart.py'}", f"--config.steps={STEPS}", "--config.rollout.batch_size=16",
    "--config.optimizer.micro_batch=8", "--config.checkpoints.every=3", "--config.checkpoints.keep_last=9",
    "--config.evaluation.benchmarks=()", "--config.log.report=false",
    "--config.optimizer.schedule=constant",  # a run may then go on for more steps
]  # fmt: skip
KEYS = """
step phase loss gap_mean gap_abs_mean gap_pos_mean selected_fraction selected_mass selected_length_mean
length_mean truncated_fraction repetition entropy sampler_gap grad_norm grad_clipped learning_rate
prompt_tokens response_tokens seconds tokens_per_second memory_gib skipped
""".split()


def checkpoints(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, command):
    """An uninterrupted run: (work directory, how it ended)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    ended = command("train", f"--workdir={workdir}", *SMALL, "--config.log.report=true")
    assert ended.code == 0, ended.err
    return workdir, ended


def same_weights(workdir, other):
    ours, theirs = (load_file(w / "export" / "model.safetensors") for w in (workdir, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


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
    assert max(map(len, ended.out.splitlines())) <= 80


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


@pytest.mark.parametrize("moment", ["between", "while saving"])
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


def with_a_third_branch(folder, **law):
    """A config file like the quickstart's with one more branch."""
    file = folder / "three.py"
    text = (ROOT / "configs/quickstart.py").read_text().replace("__file__", repr(str(ROOT / "configs/quickstart.py")))
    third = f"    config.branches.law = {law!r}\n    return config\n"
    file.write_text(text.replace("    return config\n", third))
    return [f"--config={file}", *SMALL[1:]]


def test_three_branches_with_two_specialists(command, tmp_path):
    """A run with a third branch and teacher is killed and resumed with equal results; the report has all branches."""
    specialist = tmp_path / "lawyer"
    shutil.copytree(QUICKSTART / "specialist", specialist)
    tensors = load_file(specialist / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.1)
    save_file(tensors, specialist / "model.safetensors", metadata={"format": "pt"})
    flags = with_a_third_branch(
        tmp_path, teacher=str(specialist), prompts={"source": str(QUICKSTART / "domain_prompts.jsonl")}, steps=2,
        objective="jsd(beta=0.3)",
    )  # fmt: skip
    workdirs = [tmp_path / "one", tmp_path / "two"]
    ended = command("train", f"--workdir={workdirs[0]}", *flags, "--config.log.report=true")
    assert ended.code == 0, ended.err
    rows = read_lines(workdirs[0] / "metrics.jsonl")
    assert [row["phase"] for row in rows] == ["recovery"] * 3 + ["review"] + ["law"] * 2 + ["recovery"] * 2
    assert rows[4]["gap_abs_mean"] > 1e-3 and rows[4]["loss"] > 0
    assert {row["phase"] for row in read_lines(workdirs[0] / "selection.jsonl")} == {"recovery", "review", "law"}
    assert "law" in (workdirs[0] / "report.html").read_text()
    saved = lambda: 3 in checkpoints(workdirs[1]) if (workdirs[1] / "checkpoints").exists() else False  # noqa: E731
    command.start("train", f"--workdir={workdirs[1]}", *flags).when(saved, signal.SIGKILL)
    ended = command("train", f"--workdir={workdirs[1]}", *flags)
    assert ended.code == 0, ended.err
    same_weights(*workdirs)
    card = (workdirs[0] / "export" / "README.md").read_text()
    assert (
        "law (jsd(beta=0.3))" in card and str(specialist) in card and "CaMOPD" not in card.split("with camopd_jax")[0]
    )


def test_frozen_parameters_are_not_in_checkpoints_and_do_not_change(command, tmp_path):
    """Only feed-forward blocks are trained, resumed and changed in the export; other tensors are unchanged."""
    workdir, flags = tmp_path / "run", [*SMALL, "--config.optimizer.trained=layers[.]mlp[.]"]
    assert command("train", f"--workdir={workdir}", *flags, "--config.steps=3").code == 0
    ended = command("train", f"--workdir={workdir}", *flags, "--config.steps=4")
    assert ended.code == 0 and "continuing from step 3" in ended.out, ended.err
    before, after = (load_file(f / "model.safetensors") for f in (QUICKSTART / "specialist", workdir / "export"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp." in name}
    stored = sum(f.stat().st_size for f in (workdir / "checkpoints" / "4").rglob("*") if f.is_file())
    trained = sum(before[name].size for name in changed)
    assert stored < 4 * 3 * trained + 300_000 < 4 * 3 * sum(tensor.size for tensor in before.values())
    again = tmp_path / "again"
    assert command("export", f"--workdir={workdir}", f"--out={again}").code == 0
    for name, tensor in load_file(again / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, after[name], err_msg=name)


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


# ------------------------------------------------------------------------------------- mistakes


@pytest.fixture
def other(tmp_path):
    """A copy of the specialised model that a test may damage."""
    shutil.copytree(QUICKSTART / "specialist", tmp_path / "other")
    return tmp_path / "other"


def one_line(ended, *parts):
    lines = ended.err.strip().splitlines()
    assert ended.code == 2, ended.err
    assert len(lines) == 1 and lines[0].startswith("error: "), ended.err
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.stps=3"], "--config.stps is not a field of the config; did you mean steps?"),
        (["--config.steps=many"], "steps"),
        (["--config.steps=0"], "config.steps is 0; give a number > 0"),
        (
            ["--config.rollout.batch_size=17"],
            "config.optimizer.micro_batch is 8; give a divisor of rollout.batch_size = 17",
        ),
        (["--config.mesh.data=3"], "mesh data 3 x fsdp 1 x tensor 1 needs 3 devices, not 1"),
        (["--config.general_model=/no/where"], "config.general_model: no folder /no/where"),
        (["--config.general_model=no/where"], "config.general_model: no folder no/where, and it cannot be"),
        (
            ["--config.branches.recovery.prompts.source=none.jsonl"],
            "config.branches.recovery.prompts.source: no file none.jsonl",
        ),
        (["--config.general.source=x.jsonl"], "is now config.branches.recovery.prompts"),
        (["--config.method.recovery.scale=1"], "is now config.branches.recovery (score is selection.by"),
        (
            ["--config.branches.review.objective=kl"],
            "config.branches.review.objective is 'kl'; the objectives are sampled",
        ),
        (["--config.branches.review.teacher=/no/where"], "config.branches.review.teacher: no folder /no/where"),
        (["--config.optimizer.trained=mpl"], "config.optimizer.trained is 'mpl', which matches no parameter name"),
        (["--config.rollout.max_prompt_tokens=3"], "none of its prompts fits config.rollout.max_prompt_tokens = 3"),
        (
            ["--config.rollout.max_response_tokens=99999999"],
            "lower config.rollout.max_response_tokens, or use more devices",
        ),
        (["--config.rollout.batch_size=80000000"], "prefill takes about 3"),
        (["--confg.steps=3"], "Unknown command line flag"),
        (["steps=3"], "'steps=3' is not a flag"),
    ],
)
def test_mistakes_on_the_command_line(command, tmp_path, flags, message):
    one_line(command("train", f"--workdir={tmp_path / 'run'}", *SMALL, *flags), message)
    assert not (tmp_path / "run").exists()


def test_missing_config_and_workdir(command, tmp_path):
    one_line(command("train", f"--workdir={tmp_path / 'run'}"), "--config is missing")
    one_line(command("train", "--workdir=x", "--config=none.py"), "--config", "none.py")
    one_line(command("train", SMALL[0]), "--workdir is missing; for example --workdir=runs/quickstart")


def test_a_batch_that_the_mesh_does_not_divide(command, tmp_path):
    flags = ["--config.rollout.batch_size=20", "--config.optimizer.micro_batch=4"]
    ended = command("train", f"--workdir={tmp_path / 'run'}", *SMALL, *flags, devices=8)
    one_line(ended, "config.rollout.batch_size is 20, which is not a multiple of data x fsdp = 8 of config.mesh")


def test_a_workdir_of_another_run_and_another_teacher(whole, command, other, tmp_path):
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
    shutil.copy(other / "model.safetensors", general)
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
@pytest.mark.parametrize("content", ["{}", "[]"])
def test_a_damaged_small_file_of_a_checkpoint(command, spoilt_run, tmp_path, item, content):
    run, checkpoint = spoilt_run
    (checkpoint / item / "metadata").write_text(content)
    ended = command("export", f"--workdir={run}", f"--out={tmp_path / 'out'}")
    one_line(ended, f"{checkpoint}: damaged on disk", "the run has checkpoints [3, 6, 8]: give another one")


def spoil_vocab(folder):
    edit_json(folder / "config.json", vocab_size=60)


def spoil_tensors(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_vocab, "has shape [52, 96], config.json asks for [60, 96]"),
        (spoil_tensors, "is cut short at tensor"),
        (lambda f: swap_tokens(f, "a", "b"), "tokenizers differ, first at token 'b'"),
        (lambda f: edit_json(f / "config.json", model_type="mamba"), "model_type 'mamba' is not supported"),
        (lambda f: edit_json(f / "config.json", sparse_topk=8), "field sparse_topk = 8 is not known for llama"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "is a pickle"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda f: edit_json(f / "tokenizer_config.json", chat_template=None), "no chat template"),
    ],
)  # fmt: skip
def test_invalid_checkpoints(command, other, tmp_path, spoil, message):
    spoil(other)
    one_line(
        command("train", f"--workdir={tmp_path / 'run'}", *SMALL, f"--config.specialised_model={other}"),
        str(other),
        message,
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_padded_vocabularies_may_differ_in_size(command, other, tmp_path):
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"] = np.pad(tensors["model.embed_tokens.weight"], ((0, 12), (0, 0)))
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    edit_json(other / "config.json", vocab_size=64)
    ended = command(
        "train", f"--workdir={tmp_path / 'run'}", *SMALL, f"--config.specialised_model={other}", "--config.steps=1"
    )
    assert ended.code == 0, ended.err
    assert load_file(tmp_path / "run/export/model.safetensors")["model.embed_tokens.weight"].shape == (64, 96)


def test_a_specialist_with_a_token_of_its_own(command, other, tmp_path):
    """With [PAD], which it would say all the time: the student never does, and its row is kept as it is."""
    add_tokens(other, "[PAD]")
    template = json.loads((other / "tokenizer_config.json").read_text())["chat_template"]
    edit_json(other / "tokenizer_config.json", chat_template=None)
    (other / "chat_template.jinja").write_text(template)
    (other / "additional_chat_templates").mkdir()
    (other / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    general = shutil.copytree(QUICKSTART / "generalist", tmp_path / "general")
    for folder in (general, other):
        tensors = load_file(folder / "model.safetensors")
        embedding = tensors["model.embed_tokens.weight"]
        row = 30 * embedding[5:6]  # tied: the logit is 30 times that of the end of an answer
        tensors["model.embed_tokens.weight"] = np.pad(np.concatenate([embedding, row]), ((0, 11), (0, 0)))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        edit_json(folder / "config.json", vocab_size=64)
    workdir = tmp_path / "run"
    models = [f"--config.specialised_model={other}", f"--config.general_model={general}"]
    ended = command("train", f"--workdir={workdir}", *SMALL, *models, "--config.steps=1")
    assert ended.code == 0, ended.err
    said = " ".join(ended.out.split())
    assert "share their first 52 tokens; the student's answers contain no others, such as '[PAD]'" in said
    (metrics,) = read_lines(workdir / "metrics.jsonl")
    assert np.isfinite(metrics["loss"]) and metrics["truncated_fraction"] < 1
    trained = load_file(workdir / "export/model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(trained[52:53], row)
    assert (trained[:52] != embedding).any()
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / "export")
    assert tokenizer.convert_tokens_to_ids("[PAD]") == 52
    assert tokenizer.chat_template == {"default": template, "tool_use": "{{ tools }}"}


def test_different_eos_is_a_warning(command, other, tmp_path):
    edit_json(other / "generation_config.json", eos_token_id=[5, 0])
    ended = command(
        "train", f"--workdir={tmp_path / 'run'}", *SMALL, f"--config.specialised_model={other}", "--config.steps=1"
    )
    assert ended.code == 0 and "warning: answers end with ['<|pad|>', '<|end|>']" in ended.out


def test_the_error_for_a_bad_row_names_the_line(command, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    one_line(
        command("train", f"--workdir={tmp_path / 'run'}", *SMALL, f"--config.branches.recovery.prompts.source={bad}"),
        f"{bad}:2: no prompt",
    )


def test_a_teacher_that_is_not_finite_is_named_before_the_first_step(command, other, tmp_path):
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 3e38)  # finite, but no logit is
    teacher = tmp_path / "teacher"
    shutil.copytree(QUICKSTART / "generalist", teacher)
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    ended = command("train", f"--workdir={tmp_path / 'run'}", *SMALL, f"--config.general_model={teacher}")
    one_line(ended, f"config.general_model = {teacher}", "not finite")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_steps_that_are_not_finite_end_the_run(command, tmp_path):
    flags = ["--config.optimizer.learning_rate=1e38", "--config.max_skipped=2"]
    ended = command("train", f"--workdir={tmp_path / 'run'}", *SMALL, *flags)
    one_line(ended, "2 recovery updates in a row", "not finite", "Checkpoints are kept")
    assert [m["skipped"] for m in read_lines(tmp_path / "run/metrics.jsonl")] == [0, 1, 2]


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


def test_prompts_that_changed_between_two_starts(command, tmp_path):
    rows = (QUICKSTART / "general_prompts.jsonl").read_text().splitlines(keepends=True)
    prompts, workdir = tmp_path / "general.jsonl", tmp_path / "run"
    prompts.write_text("".join(rows[:64]))
    flags = [*SMALL, f"--workdir={workdir}", f"--config.branches.recovery.prompts.source={prompts}", "--config.steps=1"]
    assert command("train", *flags).code == 0
    prompts.write_text("".join(rows[1:65]))
    one_line(command("train", *flags), f"{workdir}: its run began with other recovery prompts")


def test_clip_rates_by_phase():
    from camopd_jax.runs.training import clip_rates

    steps = [("recovery", 1.0), ("recovery", 0.0), ("review", 1.0)]
    metrics = [{"phase": phase, "grad_clipped": clipped} for phase, clipped in steps]
    assert clip_rates(metrics) == "gradients clipped: 50 % of recovery steps, 100 % of review steps"
    assert "cancels the branches' scales" in clip_rates(metrics[:1] + metrics[2:])


def test_help_lists_the_flags(command):
    ended = command("train", "--help")
    assert (
        ended.code == 0
        and "--config" in ended.out
        and "--workdir" in ended.out
        and "continues from the last checkpoint" in ended.out
    )
