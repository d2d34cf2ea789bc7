"""Small work directories of runs and grids, as `train` and `compare` write them."""

import dataclasses
import json

from camopd_jax.config.identity import changed, to_json
from camopd_jax.config.methods import METHODS
from camopd_jax.config.schema import Benchmark, BranchConfig, Evaluation, Stream, TrainConfig
from camopd_jax.evals.results import summarise
from camopd_jax.evals.task import Grade

BENCHMARKS = (Benchmark("sums"), Benchmark("logic"), Benchmark("drugs", "choice", axis="domain"))
NOTHING, EVERYTHING = [0.0] * 8, [1.0] * 8
TEACHERS = {"general": {"sums": EVERYTHING, "logic": EVERYTHING, "drugs": NOTHING},
            "specialised": {"sums": NOTHING, "logic": NOTHING, "drugs": EVERYTHING}}  # fmt: skip
HALF = {"sums": [1.0, 0.0] * 4, "logic": [1.0, 0.0] * 4, "drugs": EVERYTHING}


def config(method="camopd", branches=None, **changes):
    """A run's config; `changes` are fields with dotted names.

    Args:
      branches: names and steps in a cycle, in place of the method's branches.
    """
    if branches:
        of = {name: BranchConfig(steps=steps) for name, steps in branches.items()}
    else:
        of = TrainConfig("", "").branches
    of = {name: dataclasses.replace(branch, prompts=Stream(f"{name}.jsonl")) for name, branch in of.items()}
    base = TrainConfig("original", "specialist", of, steps=12, evaluation=Evaluation(benchmarks=BENCHMARKS))
    controls = {} if branches else METHODS[method].changes
    return changed(base, controls | changes)


def write_run(folder, method="camopd", *, steps=None, student=HALF, standings=(), exported=True, prompt="<|user|>2+2",
              diagnostics=(), branches=None, **changes):  # fmt: skip
    """Writes a run that has done `steps` steps (default: all) and returns its folder.

    Args:
      student: grades of the final model by benchmark; None: not evaluated.
      standings: (step, recovery, retention) of evaluations during training.
      branches: names and steps in a cycle, in place of the method's branches.
    """
    made = config(method, branches, **changes)
    cycle = [name for name, branch in made.branches.items() for _ in range(branch.steps)]
    mixed = made.method.schedule == "mixed"
    steps = range(made.steps if steps is None else steps)
    pairs = [(step, name) for step in steps for name in (made.branches if mixed else [cycle[step % len(cycle)]])]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"kind": "TrainConfig", "config": to_json(made)}))
    write(folder / "metrics.jsonl", [mixed_row(step, made.branches) for step in steps] if mixed else
          [metrics_row(step, name) for step, name in pairs])  # fmt: skip
    write(folder / "samples.jsonl", [sample_row(step, name, prompt) for step, name in pairs])
    write(folder / "selection.jsonl", [selection_row(step, name) for step, name in pairs])
    if diagnostics:
        write(folder / "diagnostics.jsonl", diagnostics)
    rows = [standing_row(*of) for of in standings]
    if student:
        for name, of_teacher in TEACHERS.items():
            rows += result_rows(name, 0, of_teacher)
        rows += result_rows("student", len(steps), student)
    write(folder / "eval.jsonl", rows)
    if exported:
        (folder / "export").mkdir()
    return folder


def write_grid(folder, students, sweep=None):
    """Writes a finished grid; `students` has the grades of the final models by method and seed."""
    settings = dict.fromkeys(students, 0.0002)
    for method, of_seeds in students.items():
        for seed, student in of_seeds.items():
            write_run(folder / method / "0.0002" / f"seed-{seed}", method, student=student, seed=seed)
        write_run(folder / method / "0.0004" / "seed-1000", method, seed=1000)
    facts = {"axes": {b.name: b.axis for b in BENCHMARKS}, "settings": settings, "outcomes": {}, "failed": {},
             "merits": sweep or {}, "tokens": {}, "seconds": 600, "workers": 2}  # fmt: skip
    (folder / "study.json").write_text(json.dumps(facts))
    return folder


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def result_rows(model, step, by_benchmark):
    return [{"model": model, "step": step, "checkpoint": model, "asked": b.name}
            | summarise(b, [[Grade(score)] for score in by_benchmark[b.name]], [3] * 8, [True] * 8)
            for b in BENCHMARKS]  # fmt: skip


def standing_row(step, recovery, retention):
    return {"step": step, "model": "student", "benchmark": "standing", "keeps": True, "merit": recovery,
            "recovery": {"sums": [recovery, 0.05], "logic": [recovery, 0.05], "mean": [recovery, 0.04]},
            "retention": {"drugs": [retention, 0.02], "mean": [retention, 0.02]}}  # fmt: skip


def metrics_row(step, phase):
    return {"step": step, "phase": phase, **branch_figures(step), **step_figures()}


def mixed_row(step, branches):
    own = {
        name: {key: value * (1 + i) for key, value in branch_figures(step).items()} for i, name in enumerate(branches)
    }
    return {"step": step, "phase": "mixed", "loss": 0.5, **own, **step_figures()}


def branch_figures(step):
    return {"loss": 1 / (step + 1), "gap_mean": -0.5 / (step + 1), "gap_abs_mean": 0.7 / (step + 1),
            "gap_pos_mean": 0.1, "selected_fraction": 0.25 + step / 100, "selected_mass": 0.8, "entropy": 0.2,
            "selected_length_mean": 5.0, "length_mean": 7.0, "truncated_fraction": 0.0}  # fmt: skip


def step_figures():
    seconds = {"rollout": 0.3, "score": 0.2, "select": 0.01, "update": 0.4, "other": 0.09}
    return {"grad_norm": 3.0, "grad_clipped": 1.0, "learning_rate": 1e-4, "response_tokens": 100, "repetition": 0.02,
            "seconds": seconds, "tokens_per_second": 100.0, "skipped": 0}  # fmt: skip


def sample_row(step, branch, prompt):
    return {"step": step, "phase": branch, "prompt_index": step, "prompt": f"{prompt} of {step}",
            "response": "fo ur<e>", "tokens": ["fo", " ur", "<e>"], "gaps": [1.5, -0.3, 0.0], "selected": step % 2 == 0,
            "finish_reason": "stop"}  # fmt: skip


def selection_row(step, branch):
    return {"step": step, "phase": branch, "index": [1, 2, 3], "score": [0.0, 0.02 * (step + 1), 2.0],
            "selected": [False, False, True], "length": [5, 6, 7], "truncated": [False] * 3, "entropy": [0.1, 0.2, 0.3],
            "student_loss": [0.1, 0.2, 0.3], "teacher_loss": [0.1, 0.2, 0.3]}  # fmt: skip


def diagnostics_row(step, **changes):
    sets = {"selected": 0.6, "all": 0.4, "random": 0.45}
    branch = {"coherence": sets, "gcg": 0.5, "gcg_random": -0.1, "signal": sets, "selected_fraction": 0.2}
    pair = {"dot": -1.0, "cosine": -0.1, "survives": 0.7}
    measured = {name: [0.3, 0.1, 0.5] for name in ("length", "truncated", "entropy", "student_loss", "teacher_loss")}
    return {"step": step, "rows": 64, "parameters": "", "sketch": 0, "branches": {"recovery": branch, "review": branch},
            "conflict": {"selected": pair, "all": pair},
            "layers": {"embedding": -0.2, "layer 0": 0.1, "final_norm": 0.3},
            "correlations": {"recovery": measured, "review": measured}} | changes  # fmt: skip
