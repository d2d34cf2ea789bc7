"""Measures where the specialised model has moved away from the original: a map of the gap over a branch's prompts.

The gap is that of a run's first steps. The specialised model answers prompts, and at each token of its answers

    gap = KL(specialised || original) over the full vocabulary, in nats.

Its mean is that of `log specialised - log original` of the sampled tokens, the negative gap of a rollout. Given the
answers it is exact, so its standard error is smaller, and it is never negative, as a weight must be.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from etils import epath
from rich import box
from rich.markup import escape
from rich.table import Table

from camopd_jax.config.schema import Sampling, TrainConfig
from camopd_jax.data import prompt_map
from camopd_jax.data.clusters import cluster
from camopd_jax.data.pipeline import GAP, PromptStream, TokenisedPrompt
from camopd_jax.data.prompt_map import Group, PromptMap
from camopd_jax.errors import UserError
from camopd_jax.inference.answer import answer
from camopd_jax.inference.batches import global_batch
from camopd_jax.inference.features import prompt_features
from camopd_jax.method.branches import Branch, Models, check_models, load_models, make_branches, make_teachers
from camopd_jax.method.objectives.full_vocabulary import ReverseKL
from camopd_jax.method.setup import Setup, resolve
from camopd_jax.rollout.head import TokenFunction, head_params, map_tokens
from camopd_jax.rollout.masks import row_mean
from camopd_jax.rollout.score import predicting_states
from camopd_jax.runs.analysis import prompt_sources
from camopd_jax.runs.teacher_answers import DRAW, spread
from camopd_jax.runtime.buckets import length_batches
from camopd_jax.runtime.distributed import broadcast, is_primary
from camopd_jax.runtime.mesh import gather
from camopd_jax.types import LanguageModel, Params, Sequences

CLUSTERS = 16  # of prompts without sources
ANSWERED = 1024  # prompts
EXAMPLES = 3  # of each group


@dataclass(frozen=True)
class MapSettings:
    """How prompts are grouped, and how many of them are answered."""

    field: str | None = None  # of a prompt's row; None: "source" if the rows have it
    clusters: int = 0  # number of clusters; 0: groups by field, or CLUSTERS clusters if rows have no source
    answered: int = ANSWERED


def map_branch(config: TrainConfig, branch: str, settings: MapSettings) -> PromptMap:
    """The map of a branch's prompts; loads models and prompts as a run does.

    Raises:
      UserError: as a run, and if the config has no such branch.
    """
    if branch not in config.branches:
        raise UserError(f"--branch={branch}: the config has the branches {', '.join(config.branches)}")
    setup = resolve(_unweighted(config, branch))
    models = load_models(setup)
    branches = make_branches(setup, models, make_teachers(setup.config, models), setup.rows, config.seed)
    check_models(setup, models, branches)
    stream = branches[branch].prompts
    assert isinstance(stream, PromptStream)
    return make(setup, models, branch, stream, settings)


def _unweighted(config: TrainConfig, branch: str) -> TrainConfig:
    """The config without weights of a branch's prompts, which may come from an older map of other prompts."""
    of = config.branches[branch]
    return replace(config, branches=config.branches | {branch: replace(of, prompts=replace(of.prompts, weights=""))})


def make(setup: Setup, models: Models, branch: str, stream: PromptStream, settings: MapSettings) -> PromptMap:
    """The map of a branch's prompts.

    Raises:
      UserError: if groups by a field are wanted and rows do not have it.
    """
    config, prompts = setup.config, stream.prompts
    names, group_of = _groups(setup, models, branch, prompts, settings)
    rows = [np.flatnonzero(group_of == number) for number in range(len(names))]
    each = max(2, settings.answered // len(names))
    answered = [spread([prompts[i] for i in of_group], each) for of_group in rows]
    gaps = iter(_gaps(setup, models, [prompt for of_group in answered for prompt in of_group]))
    decode = models.student.tokenizer.decode

    def group(number: int) -> Group:
        values = np.asarray([next(gaps) for _ in answered[number]])
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
        of_student = [prompt.student for prompt in spread(answered[number], EXAMPLES)]
        examples = tuple(decode(ids, skip_special_tokens=True) for ids in of_student)
        return Group(names[number], len(rows[number]), len(values), float(values.mean()), float(error), examples)

    groups = tuple(group(number) for number in range(len(names)))
    source = config.branches[branch].prompts.source
    of_models = {name: text for name, text in models.provenance(config).items() if not name.startswith("teacher_of")}
    return PromptMap(branch, source, stream.digest, of_models, groups, tuple(group_of.tolist()))


def _groups(
    setup: Setup, models: Models, branch: str, prompts: Sequence[TokenisedPrompt], settings: MapSettings
) -> tuple[list[str], np.ndarray]:
    """Names of the groups, and each prompt's group, int[prompts]."""
    config = setup.config
    of_rows = None if settings.clusters else prompt_sources(config, branch, settings.field or "source")
    if of_rows is None and settings.field and not settings.clusters:
        raise UserError(
            f"--field={settings.field}: a prompt of {branch} has no such field, or all have the same value in it; give "
            "another field, or --clusters"
        )
    if of_rows is not None:
        return _numbered([of_rows[prompt.index] for prompt in prompts])
    features = prompt_features(
        models.general,
        [prompt.teacher for prompt in prompts],
        batch_size=setup.score_batch,
        smallest_bucket=config.rollout.smallest_bucket,
    )
    clusters = cluster(features, settings.clusters or CLUSTERS, config.seed)
    numbers = np.asarray(broadcast(clusters.tolist))
    return [f"cluster {number + 1}" for number in range(numbers.max() + 1)], numbers


def _numbered(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The different names in their order of appearance, and the number of each one."""
    distinct = list(dict.fromkeys(names))
    number = {name: i for i, name in enumerate(distinct)}
    return distinct, np.asarray([number[name] for name in names])


# --------------------------------------------------------------------------------------- the gaps


def _gaps(setup: Setup, models: Models, prompts: Sequence[TokenisedPrompt]) -> list[float]:
    """The gap of an answer of the specialised model to each prompt, mean over its tokens."""
    config, student, teacher = setup.config, models.specialised, models.general
    smallest = config.rollout.smallest_bucket
    answers = answer(
        replace(student, eos_ids=models.student.eos_ids),
        [prompt.student for prompt in prompts],
        max_new=config.rollout.max_response_tokens,
        batch_size=config.rollout.batch_size,
        sampling=Sampling.of(config.rollout),
        seed=config.seed,
        draw=DRAW,
        rows=[prompt.index for prompt in prompts],
        smallest_bucket=smallest,
    )
    results: dict[int, float] = {}
    lengths = [len(prompt.student) + len(one.ids) for prompt, one in zip(prompts, answers, strict=True)]
    for rows in length_batches(lengths, setup.score_batch):
        given = global_batch(student.mesh, [answers[i].ids for i in rows], smallest)
        read = [global_batch(student.mesh, [getattr(prompts[i], side) for i in rows], smallest)
                for side in ("student", "teacher")]  # fmt: skip
        of_student, of_teacher = (Sequences(prompt, given.tokens, given.lengths) for prompt in read)
        chunk = config.compute.logits_chunk
        kl = _mean_kl((student.model, teacher.model), student.params, teacher.params, of_student, of_teacher, chunk)
        results |= dict(zip(rows.tolist(), gather(kl).tolist(), strict=True))
    return [results[i] for i in range(len(prompts))]


@functools.partial(jax.jit, static_argnums=(0, 5))
def _mean_kl(
    models: tuple[LanguageModel, LanguageModel],
    params: Params,
    teacher_params: Params,
    sequences: Sequences,
    of_teacher: Sequences,
    chunk: int,
) -> jax.Array:
    """float32[B]: KL(student || teacher) of the next token in nats, mean over each answer's tokens.

    Args:
      models: student and teacher.
      sequences, of_teacher: the same answers after each model's prompts.
    """
    model, teacher = models
    hidden_BTD = predicting_states(model, params, sequences)
    targets = {"tokens": sequences.tokens, "hidden": predicting_states(teacher, teacher_params, of_teacher)}
    function = TokenFunction(model, ReverseKL().loss, teacher)
    kl_BT = map_tokens(function, params, hidden_BTD, targets, chunk, head_params(teacher, teacher_params))
    return row_mean(kl_BT, sequences.lengths)


# ---------------------------------------------------------------------------------- in a run


def weigh_streams(setup: Setup, models: Models, branches: Mapping[str, Branch], workdir: epath.Path) -> None:
    """Weights the streams whose config says "gap", by maps in the work directory. Those that are missing are made."""
    for name, branch in branches.items():
        if setup.config.branches[name].prompts.weights != GAP:
            continue
        file, stream = workdir / f"prompt_map_{name}.json", branch.prompts
        assert isinstance(stream, PromptStream)  # branches that answer prompts have one
        if not broadcast(file.exists):
            made = make(setup, models, name, stream, MapSettings())
            if is_primary():
                prompt_map.write(file, made)
        values = broadcast(functools.partial(_read, file))
        stream.weigh(prompt_map.from_json(values), str(file))


def _read(file: epath.Path) -> dict[str, Any]:
    """The map in a file as JSON values."""
    return asdict(prompt_map.read(file, str(file)))


def table(made: PromptMap) -> Table:
    """The groups by descending gap, with the share of the draws that weights by gap give them."""
    view = Table(title=f"{made.branch} prompts", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("group", "prompts", "answered", "gap, nats per token", "drawn", "an example"):
        view.add_column(name, overflow="fold")
    draws = made.draws()
    for number in sorted(range(len(made.groups)), key=lambda number: -made.groups[number].gap):
        one = made.groups[number]
        example = " ".join(one.examples[0].split())[:60]
        sizes = str(one.prompts), str(one.answered)
        share = f"{100 * draws[number] / sum(draws):.1f} %"
        view.add_row(escape(one.name), *sizes, f"{one.gap:.3f} ± {one.error:.3f}", share, escape(example))
    (mean, error), answered = made.gap, sum(one.answered for one in made.groups)
    view.add_row("all", str(len(made.group_of)), str(answered), f"{mean:.3f} ± {error:.3f}", "", "")
    return view
