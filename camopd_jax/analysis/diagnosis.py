"""Measures the gradients of a model in training on a fixed set of prompts of each branch.

A diagnosis has its own prompts and random keys. So it does not change the run, and its rows are comparable over steps.
`analysis.gradients` has the equations.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from camopd_jax.analysis import gradients, selection
from camopd_jax.method.branches import Models, Teacher, make_branches
from camopd_jax.method.gradient import Loss
from camopd_jax.method.programs import Programs
from camopd_jax.method.setup import Setup
from camopd_jax.method.statistics import answer_table
from camopd_jax.runtime.mesh import global_rows, sharding
from camopd_jax.types import Batch, TrainState

PROMPT_SEED = 2**20  # seed for the selection of a diagnosis's prompts
FIRST_DRAW = 2**30  # first draw of a diagnosis; the steps of a run have smaller ones

Row = dict[str, Any]


class Diagnosis:
    """Compiles the measurement once; call it with the state of a step."""

    def __init__(self, setup: Setup, models: Models, teachers: dict[str, Teacher], programs: Programs):
        """
        Args:
          teachers: the run's teacher of each branch.
        """
        self._setup, self._programs = setup, programs
        config, mesh = setup.config, setup.mesh
        rows = dict.fromkeys(config.branches, config.diagnostics.rows)
        self._branches = make_branches(setup, models, teachers, rows, PROMPT_SEED)
        self._prompts = {
            name: global_rows(mesh, next(branch.prompts), rows[name]) for name, branch in self._branches.items()
        }
        student, replicated = models.student.model.on(None), sharding(mesh)
        losses = {
            name: Loss(
                student, branch.objective, branch.teacher.model.on(None) if branch.objective.teacher_logits else None
            )
            for name, branch in self._branches.items()
        }
        measure = partial(gradients.measure, losses=losses, config=config)
        self._measure = jax.jit(measure, out_shardings=replicated)
        self._tables = jax.jit(
            lambda batches: {name: answer_table(batch) for name, batch in batches.items()}, out_shardings=replicated
        )

    def __call__(self, step: int, state: TrainState) -> tuple[Row, dict[str, selection.AnswerTable]]:
        """The row of diagnostics.jsonl for a model after `step` steps, and the table of each branch's answers."""
        batches = {name: self._answers(i, name, step, state) for i, name in enumerate(self._branches)}
        config = self._setup.config
        key = jax.random.fold_in(jax.random.key(config.seed), FIRST_DRAW)
        measured = jax.tree.map(np.asarray, self._measure(self._programs.params(state), batches, key, state.objectives))
        tables = self._tables({name: batch.after_gradient() for name, batch in batches.items()})
        tables = jax.tree.map(lambda column: np.asarray(column).tolist(), tables)
        settings = config.diagnostics
        row = {"step": step, "rows": settings.rows, "parameters": settings.parameters, "sketch": settings.sketch}
        correlations = {name: selection.correlations(table) for name, table in tables.items()}
        return row | figures(measured) | {"correlations": correlations}, tables

    def _answers(self, number: int, name: str, step: int, state: TrainState) -> Batch:
        branch, programs, prompts = self._branches[name], self._programs, self._prompts[name]
        draw = np.int32(FIRST_DRAW + len(self._branches) * step + number)
        answers = programs.generate(branch, state, prompts, draw)
        # With a forward pass of the student, the gaps are exactly 0 if both models are equal.
        log_probs, teacher = programs.score(branch, state, prompts, answers, forward=True)
        ranked = programs.select(branch, log_probs, answers, draw)
        answers = answers.replace(residuals=())
        return Batch(prompts.student, prompts.index, answers, log_probs, ranked, teacher)


def figures(measured: dict[str, Any]) -> Row:
    """Ratios of the results of `gradients.measure`, as JSON values; null if a denominator is 0."""
    branches = {}
    for branch, of_set in measured["branches"].items():
        coherence = _by_set(of_set["sum"], of_set["lengths"])
        branches[branch] = {
            "coherence": coherence,
            "gcg": _gain(coherence["selected"], coherence["all"]),
            "gcg_random": _gain(coherence["selected"], coherence["random"]),
            "signal": _by_set(of_set["sum"], of_set["count"]),
            "selected_fraction": float(of_set["count"][0] / of_set["count"][1]),
        }
    conflict = {}
    for name in measured["products"]:
        dots, g, d = _pair(measured, name)
        dot, lengths = _sum(dots), [np.sqrt(_sum(g)), np.sqrt(_sum(d))]
        left = np.sqrt(max(_sum(g) + _sum(d) + 2 * dot, 0.0))
        conflict[name] = {
            "dot": float(dot),
            "cosine": _ratio(dot, lengths[0] * lengths[1]),
            "survives": _ratio(left, sum(lengths)),
        }
    groups = list(_by_layer(*_pair(measured, "all"))) if conflict else []
    layers = {group: _ratio(value, np.sqrt(g_square * d_square)) for group, value, g_square, d_square in groups}
    layer_dots = {group: float(value) for group, value, *_ in groups}
    return {"branches": branches, "conflict": conflict, "layers": layers, "layer_dots": layer_dots}


def _pair(measured: dict[str, Any], name: str) -> tuple[gradients.Named, ...]:
    """By group: the inner product of a set's mean gradients in the first two branches, and their squared norms."""
    first_two = list(measured["squares"].values())[:2]
    return measured["products"][name], *(squares[name] for squares in first_two)


def _by_set(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, float | None]:
    """The ratio for each set, and its mean over the random sets."""
    ratios = [_ratio(a, b) for a, b in zip(numerator, denominator, strict=True)]
    random = ratios[len(gradients.SETS) :]
    known = [ratio for ratio in random if ratio is not None]
    mean = float(np.mean(known)) if len(known) == len(random) else None
    return dict(zip(gradients.SETS, ratios, strict=False)) | {"random": mean}


def _gain(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else _ratio(ours - theirs, theirs)


def _by_layer(*groups: gradients.Named) -> Iterator[tuple[Any, ...]]:
    """(name, value of each argument) for every group; "layers" has one entry for each layer, and so has an attention
    that only some layers have.
    """
    for group in groups[0]:
        values = [np.atleast_1d(of[group]) for of in groups]
        for i, each in enumerate(zip(*values, strict=True)):
            yield f"layer {i}" if group == "layers" else f"{group} {i}" if len(values[0]) > 1 else group, *each


def _sum(groups: gradients.Named) -> float:
    return float(sum(np.sum(value) for value in groups.values()))


def _ratio(a: float, b: float) -> float | None:
    return float(a / b) if b > 0 else None
