"""`train` with other models, prompts, branches and flags: what works, and the one line for what does not."""

import json
import shutil
import signal

import numpy as np
import pytest
import transformers
from quickstart import QUICKSTART, ROOT, SMALL, checkpoints, one_line, same_weights
from rows import add_tokens, edit_json, read_lines, swap_tokens
from safetensors.numpy import load_file, save_file


def with_a_third_branch(folder, **law):
    """A config file like the quickstart's with one more branch."""
    file = folder / "three.py"
    text = (ROOT / "configs/quickstart.py").read_text().replace("__file__", repr(str(ROOT / "configs/quickstart.py")))
    third = f"    config.branches.law = {law!r}\n    return config\n"
    file.write_text(text.replace('method="recover"', 'method="camopd"').replace("    return config\n", third))
    return [f"--config={file}", *SMALL[1:]]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.fixture
def other(tmp_path):
    """A copy of the specialised model that a test may damage."""
    shutil.copytree(QUICKSTART / "specialist", tmp_path / "other")
    return tmp_path / "other"


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


def test_prompts_that_changed_between_two_starts(command, tmp_path):
    rows = (QUICKSTART / "general_prompts.jsonl").read_text().splitlines(keepends=True)
    prompts, workdir = tmp_path / "general.jsonl", tmp_path / "run"
    prompts.write_text("".join(rows[:64]))
    flags = [*SMALL, f"--workdir={workdir}", f"--config.branches.recovery.prompts.source={prompts}", "--config.steps=1"]
    assert command("train", *flags).code == 0
    prompts.write_text("".join(rows[1:65]))
    one_line(command("train", *flags), f"{workdir}: its run began with other recovery prompts")


def test_help_lists_the_flags(command):
    ended = command("train", "--help")
    assert (
        ended.code == 0
        and "--config" in ended.out
        and "--workdir" in ended.out
        and "continues from the last checkpoint" in ended.out
    )
