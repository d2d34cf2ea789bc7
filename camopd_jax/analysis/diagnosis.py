"""What the gradients of a model in training look like, on a fixed set of prompts of each branch.

A diagnosis asks prompts of its own, with random keys of its own: the run is the same with and without it, and its rows
are comparable over steps. `analysis.gradients` has the equations.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from camopd_jax.analysis import gradients, selection
from camopd_jax.config.schema import TrainConfig
from camopd_jax.method.branches import Models, make_branches
from camopd_jax.method.loop import BRANCHES, Programs, ask, cut_to_bucket, score_both, without_residuals
from camopd_jax.method.statistics import answer_table
from camopd_jax.runtime.mesh import global_rows, sharding
from camopd_jax.types import Params, Scored

PROMPT_SEED = 2**20  # of the order in which a diagnosis's prompts are drawn
FIRST_DRAW = 2**30  # random keys from here on are no step's of a run

Row = dict[str, Any]


class Diagnosis:
    """Compiled once; called with a step's parameters."""

    def __init__(self, config: TrainConfig, models: Models, mesh: Mesh, programs: Programs):
        self._config, self._programs = config, programs
        rows = dict.fromkeys(BRANCHES, config.diagnostics.rows)
        self._branches = make_branches(config, models, mesh, rows, PROMPT_SEED)
        self._prompts = {
            name: global_rows(mesh, next(branch.prompts), rows[name]) for name, branch in self._branches.items()
        }
        alone = dataclasses.replace(models.student.model, mesh=None)
        everywhere = sharding(mesh)
        self._measure = jax.jit(partial(gradients.measure, model=alone, config=config), out_shardings=everywhere)
        self._tables = jax.jit(partial(jax.tree.map, answer_table, is_leaf=_is_scored), out_shardings=everywhere)

    def __call__(self, step: int, params: Params) -> tuple[Row, dict[str, selection.AnswerTable]]:
        """The row of diagnostics.jsonl for a model after `step` steps, and the tables of the answers it rests on."""
        parts = {name: self._answers(i, name, step, params) for i, name in enumerate(self._branches)}
        key = jax.random.fold_in(jax.random.key(self._config.seed), FIRST_DRAW)
        found = jax.tree.map(np.asarray, self._measure(params, parts, key))
        tables = jax.tree.map(lambda column: np.asarray(column).tolist(), self._tables(parts))
        settings = self._config.diagnostics
        row = {"step": step, "rows": settings.rows, "parameters": settings.parameters, "sketch": settings.sketch}
        correlations = {name: selection.correlations(table) for name, table in tables.items()}
        return row | figures(found) | {"correlations": correlations}, tables

    def _answers(self, number: int, name: str, step: int, params: Params) -> Scored:
        branch, programs, prompts = self._branches[name], self._programs, self._prompts[name]
        draw = np.int32(FIRST_DRAW + len(self._branches) * step + number)
        answers = ask(self._config, programs, branch, params, prompts, draw)
        answers = cut_to_bucket(answers, self._config.rollout.smallest_bucket)
        # A pass of the student's own: equal models have gaps of 0.
        scores = score_both(self._config, programs, branch, params, prompts, answers, forward=True)
        ranked = programs.select[name](scores, answers.lengths, draw)
        return without_residuals(Scored(prompts.student, prompts.index, answers, scores, ranked))


def figures(found: dict[str, Any]) -> Row:
    """Ratios of what `gradients.measure` found, as JSON values; null where there is no gradient to divide by."""
    branches = {}
    for branch, of_set in found["branches"].items():
        coherence = _by_set(of_set["sum"], of_set["lengths"])
        branches[branch] = {
            "coherence": coherence,
            "gcg": _gain(coherence["selected"], coherence["all"]),
            "gcg_random": _gain(coherence["selected"], coherence["random"]),
            "signal": _by_set(of_set["sum"], of_set["count"]),
            "selected_fraction": float(of_set["count"][0] / of_set["count"][1]),
        }
    conflict = {}
    for name in gradients.SETS:
        dots, g, d = _pair(found, name)
        dot, lengths = _sum(dots), [np.sqrt(_sum(g)), np.sqrt(_sum(d))]
        left = np.sqrt(max(_sum(g) + _sum(d) + 2 * dot, 0.0))
        conflict[name] = {
            "dot": float(dot),
            "cosine": _ratio(dot, lengths[0] * lengths[1]),
            "survives": _ratio(left, sum(lengths)),
        }
    groups = list(_by_layer(*_pair(found, "all")))
    layers = {group: _ratio(value, np.sqrt(g_square * d_square)) for group, value, g_square, d_square in groups}
    layer_dots = {group: float(value) for group, value, *_ in groups}
    return {"branches": branches, "conflict": conflict, "layers": layers, "layer_dots": layer_dots}


def _pair(found: dict[str, Any], name: str) -> tuple[gradients.Named, ...]:
    """By group: the product of a set's two mean gradients, and the square of each."""
    return found["products"][name], *(found["squares"][branch][name] for branch in BRANCHES)


def _by_set(numerator: np.ndarray, denominator: np.ndarray) -> dict[str, float | None]:
    """The ratio for each set, and its mean over the lots."""
    ratios = [_ratio(a, b) for a, b in zip(numerator, denominator, strict=True)]
    lots = ratios[len(gradients.SETS) :]
    mean = None if None in lots else float(np.mean(lots))
    return dict(zip(gradients.SETS, ratios, strict=False)) | {"random": mean}


def _gain(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else _ratio(ours - theirs, theirs)


def _by_layer(*groups: gradients.Named):
    """(name, value of each), with "layers" taken apart."""
    for group in groups[0]:
        values = [np.atleast_1d(of[group]) for of in groups]
        for i, each in enumerate(zip(*values, strict=True)):
            yield f"layer {i}" if group == "layers" else group, *each


def _sum(groups: gradients.Named) -> float:
    return float(sum(np.sum(value) for value in groups.values()))


def _ratio(a: float, b: float) -> float | None:
    return float(a / b) if b > 0 else None


def _is_scored(node: Any) -> bool:
    return isinstance(node, Scored)
