"""Runs whose student starts between the original and the specialised model."""

import shutil
import signal

import numpy as np
import pytest
import torch
import transformers
from quickstart import PAPER_CONFIG, QUICKSTART
from rows import read_lines
from safetensors.numpy import load_file

from camopd_jax.config.schema import Benchmark
from camopd_jax.evals.comparison import Rank, rank_student
from camopd_jax.evals.results import summarise
from camopd_jax.evals.task import Grade
from camopd_jax.runs.start import rank_by_likelihood

SMALL = [
    PAPER_CONFIG,
    "--config.rollout.batch_size=16", "--config.optimizer.micro_batch=8",
    "--config.evaluation.benchmarks=()", "--config.log.report=false", "--config.optimizer.schedule=constant",
]  # fmt: skip
FROZEN = "--config.optimizer.trained=layers[.]mlp[.]"


def tensors(folder):
    return load_file(folder / "model.safetensors")


def between(weight):
    """The tensors between the quickstart's two models."""
    general, specialised = (tensors(QUICKSTART / name) for name in ("generalist", "specialist"))
    return {name: weight * general[name].astype(float) + (1 - weight) * specialised[name] for name in specialised}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


@pytest.mark.slow
def test_frozen_parameters_stay_at_the_start_through_resume_and_export(command, tmp_path):
    workdir = tmp_path / "run"
    flags = [*SMALL, "--config.start.interpolation=0.2", FROZEN, "--config.steps=3", "--config.checkpoints.every=2"]
    assert command("train", f"--workdir={workdir}", *flags).code == 0
    once = tensors(workdir / "export")
    for name, tensor in once.items():
        still = np.allclose(tensor, between(0.2)[name], rtol=1e-6, atol=1e-8)
        assert still == (".mlp." not in name), name
    card = (workdir / "export" / "README.md").read_text()
    assert "CaMOPD (arXiv 2605.27115), from a start between the two models" in card
    assert "| start | `specialised + 0.2 (original - specialised)` |" in card
    shutil.rmtree(workdir / "checkpoints" / "3")
    ended = command("train", f"--workdir={workdir}", *flags)
    assert ended.code == 0 and "continuing from step 2" in ended.out, ended.err
    same(tensors(workdir / "export"), once)
    assert command("export", f"--workdir={workdir}", f"--out={tmp_path / 'again'}").code == 0
    same(tensors(tmp_path / "again"), once)


def test_the_domain_is_kept_up_to_the_error_of_the_specialised_models_own_likelihood():
    """Likelihoods .5 and .7: mean .6, standard error .1, so up to 1/6 may be lost. Paired, no loss would be allowed."""

    def results(covered, domain):
        scores = {("covered", "general"): covered, ("domain", "domain"): domain}
        return [summarise(Benchmark(name, "likelihood", axis=axis), [[Grade(x)] for x in of], [3, 3], [True] * 2)
                for (name, axis), of in scores.items()]  # fmt: skip

    general, specialised = results([0.9, 0.8], [0.1, 0.2]), results([0.5, 0.2], [0.5, 0.7])
    kept, lost = results([0.6, 0.5], [0.41, 0.61]), results([0.9, 0.8], [0.39, 0.59])
    assert rank_by_likelihood(general, specialised, kept) == Rank(True, pytest.approx(0.4))
    assert rank_by_likelihood(general, specialised, lost) == Rank(False, pytest.approx(0.49 / 0.6))
    assert not rank_student(general, specialised, kept).keeps_domain
    assert rank_by_likelihood(general, specialised, kept) > rank_by_likelihood(general, specialised, lost)


def likelihoods(weights, rows):
    """The geometric mean of the probabilities of each answer's tokens, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(QUICKSTART / "specialist", dtype=torch.float32)
    model.load_state_dict({name: torch.tensor(tensor, dtype=torch.float32) for name, tensor in weights.items()}, False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(QUICKSTART / "specialist")
    values = []
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *row["ids"]]])
        with torch.no_grad():
            log_probs = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1)
        values.append(log_probs.gather(-1, ids[0, len(prompt) :, None]).mean().exp().item())
    return np.asarray(values)


@pytest.mark.slow
def test_auto_without_benchmarks_compares_likelihoods_and_is_not_repeated(command, tmp_path):
    """Recovery and retention of a trial, by transformers; a run killed among its trials tries only the others."""
    workdir, flags = tmp_path / "run", [*SMALL, "--config.start.interpolation=auto", "--config.steps=1"]
    trials = workdir / "start.jsonl"

    def some():
        return trials.exists() and len(trials.read_text().splitlines()) >= 3

    command.start("train", f"--workdir={workdir}", *flags, FROZEN).when(some, signal.SIGKILL)
    before = trials.read_text()
    answers = (workdir / "teacher_answers" / "recovery.jsonl").read_text()
    ended = command("train", f"--workdir={workdir}", *flags, FROZEN)
    assert ended.code == 0, ended.err
    assert trials.read_text().startswith(before.rpartition("\n")[0])
    assert (workdir / "teacher_answers" / "recovery.jsonl").read_text() == answers
    rows = read_lines(trials)
    assert [row["interpolation"] for row in rows] == [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5]
    given = {name: read_lines(workdir / "teacher_answers" / f"{name}.jsonl") for name in ("recovery", "review")}
    assert all(len(of_branch) == 32 for of_branch in given.values())
    assert {row["teacher"] for row in given["recovery"]} == {"general"}
    general, specialised, student = (
        {name: likelihoods(between(w), given[name]) for name in given} for w in (1, 0, 0.2)
    )
    lost = general["recovery"].mean() - specialised["recovery"].mean()
    back = (student["recovery"].mean() - specialised["recovery"].mean()) / lost
    assert rows[4]["recovery"]["mean"][0] == pytest.approx(back, abs=1e-4)
    assert rows[4]["retention"]["mean"][0] == pytest.approx(
        student["review"].mean() / specialised["review"].mean(), abs=1e-4
    )
    error = specialised["review"].std(ddof=1) / 32**0.5 / specialised["review"].mean()
    assert [row["keeps"] for row in rows] == [row["retention"]["mean"][0] >= 1 - error for row in rows]
    best = max((row for row in rows if row["keeps"]), key=lambda row: row["merit"])["interpolation"]
    assert 0 < best < 1, "the quickstart's models keep the domain at some trial, and lose it at another"
    exported = tensors(workdir / "export")
    for name in (name for name in exported if ".mlp." not in name):
        np.testing.assert_allclose(exported[name], between(best)[name], rtol=1e-6, atol=1e-8, err_msg=name)
    assert command("export", f"--workdir={workdir}", f"--out={tmp_path / 'again'}").code == 0
    same(tensors(tmp_path / "again"), exported)


@pytest.mark.slow
def test_auto_by_the_benchmarks_is_shown_in_the_report(command, tmp_path):
    flags = [flag for flag in SMALL if "evaluation.benchmarks" not in flag and "report" not in flag]
    flags += ["--config.start.interpolation=auto", "--config.steps=1", "--config.evaluation.questions=24"]
    ended = command("train", f"--workdir={tmp_path / 'run'}", *flags)
    assert ended.code == 0, ended.err
    rows = read_lines(tmp_path / "run" / "start.jsonl")
    assert rows[0]["recovery"]["mean"] == [0.0, 0.0] and rows[0]["retention"]["mean"] == [1.0, 0.0] and rows[0]["keeps"]
    assert set(rows[1]["recovery"]) == {"covered", "uncovered", "mean"} and set(rows[1]["retention"]) == {
        "domain",
        "mean",
    }
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Trials of the student" in page and "<b>" in page.split("Trials of the student")[-1].split("</table>")[0]
