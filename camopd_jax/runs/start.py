"""The student's weights before the first step (`config.start`)."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from camopd_jax.config.schema import Benchmark, TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.evals import runner
from camopd_jax.evals.comparison import Rank, comparison, kept_share, rank_of, rank_student, recovered_share
from camopd_jax.evals.results import Result, axis_mean, on_axis, summarise
from camopd_jax.evals.task import Grade
from camopd_jax.inference import loading
from camopd_jax.inference.interpolation import interpolated
from camopd_jax.inference.loading import Loaded
from camopd_jax.inference.log_probs import score_responses
from camopd_jax.method.branches import Branch, Models
from camopd_jax.method.setup import Setup
from camopd_jax.runs.teacher_answers import teacher_answers
from camopd_jax.runtime.display import Display
from camopd_jax.runtime.distributed import broadcast, is_primary
from camopd_jax.runtime.jsonl import append_rows, read_rows
from camopd_jax.types import Params

FILE = "start.jsonl"
TRIED = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # weights of the original model
PROMPTS = 32  # of each branch, if the weights are compared by the likelihood of the teachers' answers
Measure = Callable[[Loaded, str], list[Result]]  # results of a model whose answers have this key


def begin(
    setup: Setup, models: Models, branches: Mapping[str, Branch], workdir: epath.Path
) -> tuple[Models, dict[str, str]]:
    """The models of a run with the student at its start, and facts about the start for the model card."""
    weight: Any = setup.config.start.interpolation
    if weight == 0:
        return models, {}
    general = _original(setup, models)
    if weight == "auto":
        weight = _choose(setup, models, branches, general, workdir)
    return dataclasses.replace(models, student=_at(models, general, weight)), {"start": fact(weight)}


def fact(weight: float) -> str:
    """The start in words, for the model card."""
    return f"specialised + {weight:g} (original - specialised)"


def chosen_weight(config: TrainConfig, workdir: epath.Path) -> float:
    """The weight of the original model at the start of a run that has begun.

    Raises:
      UserError: if it was chosen by trials whose file is no longer there.
    """
    weight = config.start.interpolation
    if weight != "auto":
        return weight
    rows = _trials(workdir)
    if rows.keys() < set(TRIED):
        raise UserError(f"{workdir / FILE}: the trials that chose the student's start are not complete there")
    return _best(rows)


def _original(setup: Setup, models: Models) -> Params:
    """The original model's parameters in the student's dtype."""
    compute, general = setup.config.compute, models.general
    if setup.teacher_dtype == compute.params:
        return general.params
    return loading.load(general.folder, setup.mesh, compute, dtype=compute.params, context=setup.context).params


def _at(models: Models, general: Params, weight: float) -> Loaded:
    """The student with this weight of the original model."""
    return models.student.with_params(interpolated(general, models.student.params, weight))


# ---------------------------------------------------------------------------------------- the trials


def _trials(workdir: epath.Path) -> dict[float, dict[str, Any]]:
    """The rows of start.jsonl by weight."""
    return {row["interpolation"]: row for row in read_rows(workdir / FILE) if "merit" in row}


def _best(rows: Mapping[float, dict[str, Any]]) -> float:
    """The weight with the highest rank; the smallest one if ranks are equal."""
    return max(sorted(rows), key=lambda weight: rank_of(rows[weight]))


def _choose(
    setup: Setup, models: Models, branches: Mapping[str, Branch], general: Params, workdir: epath.Path
) -> float:
    """Tries the weights that start.jsonl does not have, and returns the best of all."""
    rows = {row["interpolation"]: row for row in broadcast(lambda: list(_trials(workdir).values()))}
    missing = [weight for weight in TRIED if weight not in rows]
    if not missing:
        return _best(rows)
    display = Display(0, 0)
    if setup.config.evaluation.benchmarks:
        measure, rank_of_student = _by_benchmarks(setup.config, workdir), rank_student
    else:
        measure, rank_of_student = _by_likelihood(setup, models, branches, workdir), rank_by_likelihood
    folders = models.general.folder, models.specialised.folder
    of_general, of_specialised = (
        measure(model, runner.model_key(model)) for model in (models.general, models.specialised)
    )
    for weight in missing:
        key = f"start-{weight:g}-{'-'.join(map(loading.fingerprint, folders))}-{models.student.model.dtype}"
        results = measure(_at(models, general, weight), key) if weight else of_specialised
        rank = rank_of_student(of_general, of_specialised, results) or Rank(True, 0.0)
        rows[weight] = {"interpolation": weight, "keeps": rank.keeps_domain, "merit": rank.value}
        rows[weight] |= comparison(of_general, of_specialised, results)
        if is_primary():
            append_rows(workdir / FILE, [rows[weight]])
        display.print(f"start with {weight:g} of the original model: {_shares(rows[weight])}")
    display.close()
    return _best(rows)


def _shares(row: dict[str, Any]) -> str:
    """Recovery and retention of a trial in words."""
    means = {measure: row[measure].get("mean") for measure in ("recovery", "retention")}
    parts = [f"{name} {100 * mean[0]:.1f} ± {100 * mean[1]:.1f} %" for name, mean in means.items() if mean]
    return ", ".join(parts) or "nothing to compare"


def _by_benchmarks(config: TrainConfig, workdir: epath.Path) -> Measure:
    """Results on the benchmarks, with the questions that are used during training."""
    settings = config.evaluation

    def measure(loaded: Loaded, key: str) -> list[Result]:
        folder = runner.answers_folder(settings, workdir) / key
        return [
            runner.run_benchmark(benchmark, loaded, settings, folder, settings.questions)
            for benchmark in settings.benchmarks
        ]

    return measure


def rank_by_likelihood(
    general: Sequence[Result], specialised: Sequence[Result], student: Sequence[Result]
) -> Rank | None:
    """As `rank_student`, with the standard error of the specialised model's own likelihood.

    The error of the difference would exclude every start: likelihoods change smoothly with the weights, so near the
    specialised model that error is proportional to the difference itself.
    """
    rank = rank_student(general, specialised, student)
    recovered = recovered_share(*(on_axis(results, "general") for results in (general, specialised, student)))
    mean, kept = axis_mean(specialised, "domain"), kept_share(*(on_axis(r, "domain") for r in (specialised, student)))
    if mean is None or kept is None or recovered is None:
        return rank
    keeps_domain = kept.value >= 1 - mean[1] / mean[0]
    return Rank(keeps_domain, (recovered if keeps_domain else kept).value)


def _by_likelihood(setup: Setup, models: Models, branches: Mapping[str, Branch], workdir: epath.Path) -> Measure:
    """Likelihoods (as task `likelihood`) of the two teachers' answers to prompts of their branches.

    Branches of the original model are on the general axis, branches of the specialised one on the domain axis.
    """
    config, axes = setup.config, {"general": "general", "specialised": "domain"}
    counts = {name: PROMPTS for name, branch in config.branches.items() if branch.steps and branch.teacher in axes}
    given = teacher_answers(setup, models, branches, counts, workdir)

    def measure(loaded: Loaded, key: str) -> list[Result]:
        results = []
        for name, answers in given.items():
            axis: Any = axes[config.branches[name].teacher]
            log_probs = score_responses(
                loaded,
                [one.prompt.student for one in answers],
                [one.ids for one in answers],
                batch_size=setup.score_batch,
                smallest_bucket=config.rollout.smallest_bucket,
            )
            grades = [[Grade(math.exp(float(values.mean())))] for values in log_probs]
            lengths, stopped = [len(one.ids) for one in answers], [one.stopped for one in answers]
            results.append(summarise(Benchmark(name, "likelihood", axis=axis), grades, lengths, stopped))
        return results

    return measure
