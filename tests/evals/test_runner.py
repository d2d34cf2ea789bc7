"""Benchmarks with the quickstart's models: stored answers, interrupted evaluations, the command and its table."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from quickstart import QUICKSTART
from rows import read_lines, write_lines

from camopd_jax.config.schema import Benchmark, Compute, Evaluation, Judge
from camopd_jax.data import answers
from camopd_jax.errors import UserError
from camopd_jax.evals import questions, runner, sandbox, tasks
from camopd_jax.evals.graders import judge
from camopd_jax.evals.task import Grade
from camopd_jax.inference import loading
from camopd_jax.rollout import generate
from camopd_jax.runtime.mesh import make_mesh

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.py"
SETTINGS = Evaluation(batch_size=8)
COVERED = Benchmark("covered", "exact", str(QUICKSTART / "eval_covered.jsonl"), limit=20, max_response_tokens=32)


@pytest.fixture(scope="module")
def specialist():
    mesh = make_mesh(1, devices=jax.devices()[:1])
    return loading.load(QUICKSTART / "specialist", mesh, Compute(), dtype="float32", context=96)


@pytest.fixture
def prompt_counts(monkeypatch):
    """The number of prompts in each call of the model."""
    counts, answer = [], runner.answer

    def counted(loaded, prompts, **options):
        counts.append(len(prompts))
        return answer(loaded, prompts, **options)

    monkeypatch.setattr(runner, "answer", counted)
    return counts


def rows_of(folder, name="covered"):
    return read_lines(folder / f"{name}.jsonl")


def test_answers_and_grades_are_stored_and_computed_once(specialist, tmp_path, prompt_counts):
    folder = epath.Path(tmp_path)
    result = runner.run_benchmark(COVERED, specialist, SETTINGS, folder)
    rows = rows_of(tmp_path)
    assert len(rows) == result["n"] == 20 and sorted(row["question"] for row in rows) == list(range(20))
    assert sum(row["score"] for row in rows) / 20 == result["accuracy"]
    assert runner.run_benchmark(COVERED, specialist, SETTINGS, folder) == result
    assert prompt_counts == [20]


def test_an_interrupted_evaluation_continues_with_missing_answers(specialist, tmp_path, prompt_counts):
    folder = epath.Path(tmp_path)
    whole = runner.run_benchmark(COVERED, specialist, SETTINGS, folder)
    file = tmp_path / "covered.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:11]) + '\n{"key": "1234, "resp')  # the last line was being written
    assert runner.run_benchmark(COVERED, specialist, SETTINGS, folder) == whole
    assert prompt_counts == [20, 9] and len(rows_of(tmp_path)) == 20


@pytest.mark.parametrize(
    "lines, damage",
    [
        ([0], b'{"key": "1234, "resp'),  # cut, the first of the file
        ([5], b'{"key": "1234"}'),  # whole JSON, not a whole answer
        ([5, 6], b'"key"\n\x00\x00\x00\n'),
        ([5], '{"key": "1234", "response": "\u00e9'.encode()[:-1]),  # cut inside a character
    ],
)
def test_a_damaged_line_costs_no_answer_behind_it(specialist, tmp_path, prompt_counts, lines, damage):
    folder, file = epath.Path(tmp_path), tmp_path / "covered.jsonl"
    whole = runner.run_benchmark(COVERED, specialist, SETTINGS, folder)
    answers = [line + b"\n" for line in file.read_bytes().splitlines()]
    kept = [answer for i, answer in enumerate(answers) if i not in lines]
    file.write_bytes(b"".join([*kept[: lines[0]], damage + b"\n", *kept[lines[0] :]]))
    assert runner.run_benchmark(COVERED, specialist, SETTINGS, folder) == whole
    assert prompt_counts == [20, len(lines)] and len(rows_of(tmp_path)) == 20


def test_a_file_whose_only_line_is_cut_loses_no_later_answer(specialist, tmp_path, prompt_counts):
    folder, file = epath.Path(tmp_path), tmp_path / "covered.jsonl"
    file.write_text('{"key": "1234, "resp')
    few = dataclasses.replace(COVERED, limit=4)
    assert runner.run_benchmark(few, specialist, SETTINGS, folder)["n"] == len(rows_of(tmp_path)) == 4
    runner.run_benchmark(few, specialist, SETTINGS, folder)
    assert prompt_counts == [4]


def test_limited_questions_are_the_first_ones(specialist, tmp_path, prompt_counts):
    folder = epath.Path(tmp_path)
    few = runner.run_benchmark(COVERED, specialist, SETTINGS, folder, limit=6)
    whole = runner.run_benchmark(COVERED, specialist, SETTINGS, folder)
    assert prompt_counts == [6, 14] and whole["scores"][:6] == few["scores"] and few["asked"] != whole["asked"]


def test_a_second_model_compiles_nothing(specialist, tmp_path):
    runner.run_benchmark(COVERED, specialist, SETTINGS, epath.Path(tmp_path / "a"))
    program = generate.programs(specialist.mesh).advance
    compiled = program._cache_size()
    student = specialist.with_params(jax.tree.map(lambda p: p * 1.01, specialist.params))
    runner.run_benchmark(COVERED, student, SETTINGS, epath.Path(tmp_path / "b"))
    assert program._cache_size() == compiled > 0


def test_changed_questions_or_settings_get_new_answers(specialist, tmp_path, prompt_counts):
    folder = epath.Path(tmp_path)
    for changes in ({}, {"max_response_tokens": 16}, {"instruction": "Be brief."}, {"temperature": 1.0}):
        runner.run_benchmark(dataclasses.replace(COVERED, limit=4, **changes), specialist, SETTINGS, folder)
    assert prompt_counts == [4, 4, 4, 4]


def test_sampled_answers_differ_by_sample_and_repeat_with_the_seed(specialist, tmp_path, prompt_counts):
    benchmark = dataclasses.replace(COVERED, limit=4, samples=3, temperature=1.5)
    first = runner.run_benchmark(benchmark, specialist, SETTINGS, epath.Path(tmp_path / "a"))
    again = runner.run_benchmark(
        benchmark, specialist, dataclasses.replace(SETTINGS, batch_size=2), epath.Path(tmp_path / "b")
    )
    assert first == again, "each answer has a random key of its own, whatever its batch"
    responses = {}
    for row in rows_of(tmp_path / "a"):
        responses.setdefault(row["question"], set()).add(row["response"])
    assert any(len(texts) > 1 for texts in responses.values())
    assert len(rows_of(tmp_path / "a")) == 12 and prompt_counts == [4] * 6 and len(first["scores"]) == 4


def test_the_likelihood_of_given_answers(specialist, tmp_path, monkeypatch):
    """By hand from the log-probabilities of each answer including its final tokens; stored results are reused."""
    scored, score = [], runner.score_responses

    def counted(loaded, prompts, responses, **options):
        scored.append(len(prompts))
        return score(loaded, prompts, responses, **options)

    monkeypatch.setattr(runner, "score_responses", counted)
    benchmark = dataclasses.replace(COVERED, task="likelihood", limit=10)
    folder = epath.Path(tmp_path)
    result = runner.run_benchmark(benchmark, specialist, SETTINGS, folder)
    rows = read_lines(QUICKSTART / "eval_covered.jsonl")[:10]
    pairs = [answers.answer_ids(specialist.reader, row, row["answer"], benchmark.template) for row in rows]
    by_hand = [np.exp(score(specialist, [p], [a], batch_size=8)[0].mean()) for p, a in pairs]
    np.testing.assert_allclose(result["scores"], by_hand, rtol=1e-4)
    assert all(pair[1][-1] == specialist.eos_ids[0] for pair in pairs) and min(by_hand) < 0.9 < max(by_hand)
    lines = (tmp_path / "covered.jsonl").read_text().splitlines()
    (tmp_path / "covered.jsonl").write_text("\n".join(lines[:7]))
    assert runner.run_benchmark(benchmark, specialist, SETTINGS, folder) == result and scored[:3] == [8, 2, 3]
    with pytest.raises(UserError, match=r"eval_covered\.jsonl:1: the answer '\{no\}' asks for the field 'no'"):
        runner.run_benchmark(dataclasses.replace(benchmark, answer="{no}"), specialist, SETTINGS, folder)


def test_the_instruction_follows_the_last_request(specialist):
    def chat_row(*contents, instruction=""):
        roles = ("user", "assistant", "user")
        row = {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}
        return prompts(row, instruction)

    def prompts(row, instruction):
        benchmark = dataclasses.replace(COVERED, instruction=instruction)
        return questions.prompts(benchmark, tasks.find(COVERED, Judge()), specialist.reader, [(row, "x:1")])

    assert (
        chat_row("a", "b", "c", instruction="be brief")
        == chat_row("a", "b", "c\n\nbe brief")
        != chat_row("a", "b", "c")
    )
    row = {"prompt": "a"}
    prompts(row, "be brief")
    assert row == {"prompt": "a"}, "the row itself is as it was"


def test_a_judges_grade_is_requested_once(specialist, tmp_path, monkeypatch):
    marks = []
    monkeypatch.setattr(judge, "check", lambda config: None)

    def grade(answer, row, *, kind, config):
        marks.append(kind)
        return Grade(0.5)

    monkeypatch.setattr(judge, "grade", grade)
    benchmark = dataclasses.replace(COVERED, task="writing", limit=4)
    for model in ("a", "a", "b"):
        settings = dataclasses.replace(SETTINGS, judge=Judge("http://127.0.0.1/v1", model))
        assert runner.run_benchmark(benchmark, specialist, settings, epath.Path(tmp_path))["accuracy"] == 0.5
    assert marks == ["writing"] * 8, "four by each judge"


def test_missing_fields_are_reported_before_a_run(tmp_path):
    source = str(write_lines(tmp_path / "q.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}]))

    def check(**fields):
        runner.check(Evaluation(benchmarks=(Benchmark("b", **fields),), judge=Judge()))

    with pytest.raises(UserError, match=r'q\.jsonl:1: no "answer" to grade against, which task medqa needs'):
        check(task="medqa", source=source)
    with pytest.raises(UserError, match=r'no "test_list" to grade against'):
        check(task="mbpp", source=source)
    with pytest.raises(UserError, match=r"config\.evaluation\.benchmarks b: task exact has no dataset of its own"):
        check()
    with pytest.raises(UserError, match=r"config\.evaluation\.judge"):
        check(task="roleplay", source=source)
    with pytest.raises(UserError, match=r"benchmarks 'b': task is 'medq'; it must be one of 'exact', .*'medqa'"):
        check(task="medq", source=source)


# ------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Flags for the quickstart's config with two benchmarks of 24 questions."""
    folder = tmp_path_factory.mktemp("few")
    benchmarks = [
        dict(
            name=name,
            task=task,
            axis=axis,
            max_response_tokens=32,
            source=str(write_lines(folder / f"{name}.jsonl", read_lines(QUICKSTART / f"eval_{name}.jsonl")[:24])),
        )
        for name, task, axis in (("covered", "exact", "general"), ("domain", "choice", "domain"))
    ]
    text = CONFIG.read_text().replace("Path(__file__)", f"Path({str(CONFIG)!r})")
    config = folder / "config.py"
    config.write_text(
        text.replace("    return config\n", f"    config.evaluation.benchmarks = {benchmarks!r}\n    return config\n")
    )
    return [f"--config={config}"]


@pytest.fixture(scope="module")
def teachers(few, command, tmp_path_factory):
    """A work directory with the results of both teachers, and the output of the command."""
    workdir = tmp_path_factory.mktemp("evaluation")
    ended = command("evaluate", f"--workdir={workdir}", *few)
    assert ended.code == 0, ended.err
    return workdir, ended.out


def test_the_teachers_are_evaluated_and_printed(teachers):
    workdir, out = teachers
    rows = {(row["model"], row["benchmark"]): row for row in read_lines(workdir / "eval.jsonl")}
    assert set(rows) == {(m, b) for m in ("general", "specialised") for b in ("covered", "domain")}
    assert rows["general", "covered"]["accuracy"] > rows["specialised", "covered"]["accuracy"]
    assert "general teacher" in out and "± " in out and "greedy" in out and "domain: domain" in out


def test_a_checkpoint_is_compared_with_stored_teacher_results(teachers, few, command, tmp_path):
    workdir = tmp_path / "evaluation"
    shutil.copytree(teachers[0], workdir)
    shutil.copytree(QUICKSTART / "generalist", tmp_path / "mine")
    ended = command("evaluate", f"--workdir={workdir}", f"--checkpoint={tmp_path / 'mine'}", *few)
    assert ended.code == 0, ended.err
    assert "back | kept" in ended.out and "100 ± 0 %" in ended.out, "the general model itself has all of it back"
    assert {row["model"] for row in read_lines(workdir / "eval.jsonl")} == {
        "general",
        "specialised",
        str(tmp_path / "mine"),
    }


@pytest.mark.slow
def test_evaluating_a_run_equals_the_runs_own_evaluation(few, command, tmp_path):
    run = tmp_path / "run"
    flags = [*few, "--config.log.report=false", "--config.steps=2", "--config.checkpoints.every=1"]
    ended = command("train", f"--workdir={run}", *flags)
    assert ended.code == 0, ended.err
    of_run = {row["checkpoint"]: row["scores"] for row in read_lines(run / "eval.jsonl") if row["model"] == "student"}
    ended = command("evaluate", f"--workdir={tmp_path / 'e'}", f"--checkpoint={run},{run}/checkpoints/1", *few)
    assert ended.code == 0, ended.err
    rows = {(row["model"], row["benchmark"]): row for row in read_lines(tmp_path / "e" / "eval.jsonl")}
    last, first = rows[str(run), "domain"], rows[f"{run}/checkpoints/1", "domain"]
    assert of_run == {last["checkpoint"]: last["scores"]} and first["checkpoint"] != last["checkpoint"]


def test_after_a_kill_only_missing_answers_are_computed(teachers, few, command, tmp_path):
    workdir = tmp_path / "evaluation"
    flags = [f"--workdir={workdir}", *few, "--config.evaluation.batch_size=2"]

    def answered():
        return [line for file in workdir.glob("answers/*/*.jsonl") for line in file.read_text().splitlines()]

    ended = command.start("evaluate", *flags).when(lambda: len(answered()) >= 6, signal.SIGKILL)
    assert ended.code == -signal.SIGKILL
    before = {json.loads(line)["key"] for line in answered()[:6]}
    ended = command("evaluate", *flags)
    assert ended.code == 0, ended.err
    after = {row["key"] for file in workdir.glob("answers/*/*.jsonl") for row in read_lines(file)}
    assert before <= after
    ours, theirs = (
        [
            {k: v for k, v in row.items() if k in ("model", "benchmark", "scores", "asked")}
            for row in read_lines(w / "eval.jsonl")
        ]
        for w in (workdir, teachers[0])
    )
    assert ours == theirs


def test_it_says_first_what_programs_in_answers_are_kept_from(few, command, tmp_path):
    source = write_lines(tmp_path / "q.jsonl", [{"prompt": "Write f.", "test_list": ["assert f() == 1"]}])
    benchmark = dict(name="mbpp", task="mbpp", max_response_tokens=8, source=str(source))
    text = Path(few[0].split("=")[1]).read_text()
    config = tmp_path / "config.py"
    config.write_text(
        text.replace("    return config\n", f"    config.evaluation.benchmarks = ({benchmark!r},)\n    return config\n")
    )
    flags = [f"--workdir={tmp_path / 'e'}", f"--checkpoint={QUICKSTART / 'generalist'}", f"--config={config}"]
    ended = command("evaluate", *flags)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[1] == sandbox.protections() and lines.count(lines[1]) == 1 and "mbpp 0.0 ± " in ended.out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint=/no/such/model"], "--checkpoint: no folder /no/such/model"),
        (["--config.evaluation.benchmarks=()"], "config.evaluation.benchmarks is empty"),
        (["--config.evaluation.nothing=1"], "--config.evaluation.nothing is not a field"),
    ],
)
def test_mistakes_are_one_line(few, command, tmp_path, flags, message):
    ended = command("evaluate", f"--workdir={tmp_path / 'e'}", *few, *flags)
    assert ended.code == 2 and len(ended.err.strip().splitlines()) == 1 and message in ended.err


# ------------------------------------------------------------------------------ between the steps


@pytest.fixture(scope="module")
def measured(few, command, tmp_path_factory):
    """A run that evaluates every second step on 16 questions, and keeps and exports the best checkpoint."""
    workdir = tmp_path_factory.mktemp("measured") / "run"
    flags = [
        f"--workdir={workdir}",
        *few,
        "--config.steps=6",
        "--config.rollout.batch_size=16",
        "--config.optimizer.micro_batch=8",
        "--config.checkpoints.every=6",
        "--config.checkpoints.keep_last=1",
        "--config.checkpoints.export=best",
        "--config.evaluation.every=2",
        "--config.evaluation.questions=16",
        "--config.log.report=false",
    ]
    ended = command("train", *flags)
    assert ended.code == 0, ended.err
    return workdir, flags, ended


def test_an_evaluation_that_repeats_another_prints_no_line_again(monkeypatch):
    """The last evaluation of a run is that of its last step, if both ask all questions."""
    monkeypatch.setattr(runner, "run_benchmark", lambda *_: {"accuracy": 0.868, "standard_error": 0.056})
    lines, rows = [], []
    display = SimpleNamespace(print=lines.append)
    writer = SimpleNamespace(add_evaluation=lambda row, *_: rows.append(row))
    evaluator = runner.Evaluator(Evaluation(benchmarks=(COVERED,)), epath.Path("run"), writer, display)
    for step in (10, 20, 20):
        evaluator.run("student", None, step, "key")
    assert lines == [f"student at step {step}: covered 86.8 ± 5.6 %" for step in (10, 20)] and len(rows) == 3


def standings(workdir):
    return {row["step"]: row for row in read_lines(workdir / "eval.jsonl") if row["benchmark"] == "standing"}


def test_each_evaluation_has_recovery_and_retention(measured):
    rows = standings(measured[0])
    assert list(rows) == [2, 4, 6]
    by_hand = {}
    for row in read_lines(measured[0] / "eval.jsonl"):
        if row["benchmark"] == "covered":
            by_hand[row["model"], row["step"]] = sum(row["scores"][:16]) / 16
    general, specialised = by_hand["general", 0], by_hand["specialised", 0]
    for step, row in rows.items():
        value, error = row["recovery"]["covered"]
        assert value == pytest.approx((by_hand["student", step] - specialised) / (general - specialised)) and error >= 0
        assert set(row["retention"]) == {"domain", "mean"} and row["retention"]["mean"] == row["retention"]["domain"]
        assert row["merit"] == (row["recovery"] if row["keeps"] else row["retention"])["mean"][0]


def test_the_best_checkpoint_is_kept_and_exported(measured):
    workdir, _, ended = measured
    rows = standings(workdir)
    best = max(rows, key=lambda step: (rows[step]["keeps"], rows[step]["merit"], step))
    kept = {int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()}
    assert best in kept and kept <= {best, 4, 6}
    assert f"| steps | `{best}` |" in (workdir / "export/README.md").read_text()
    if best != 6:
        assert f"the best checkpoint is at step {best}" in ended.out


def test_teachers_answer_once_and_students_at_each_evaluation(measured):
    folders = sorted(p.name for p in (measured[0] / "answers").iterdir())
    assert len([f for f in folders if f.endswith("-float32")]) == 2
    assert {f[-6:] for f in folders if not f.endswith("-float32")} <= {"000002", "000004", "000006"}


@pytest.mark.slow
def test_patience_ends_a_run(measured, command, tmp_path):
    """With a learning rate of 0 nothing improves, so the second evaluation is the last."""
    workdir, flags, _ = measured
    flags = [f for f in flags if not f.startswith("--workdir")]
    still = ["--config.optimizer.learning_rate=0.0", "--config.evaluation.patience=1", "--config.steps=40"]
    answers = f"--config.evaluation.answers={workdir / 'answers'}"
    ended = command("train", f"--workdir={tmp_path / 'run'}", *flags, *still, answers)
    assert ended.code == 0, ended.err
    assert "no better than step" in ended.out and max(standings(tmp_path / "run")) == 4
    assert (tmp_path / "run" / "export").exists()
    again = command("train", f"--workdir={tmp_path / 'run'}", *flags, *still, answers)
    assert again.code == 0 and max(standings(tmp_path / "run")) == 4, "started again, it has ended still"
