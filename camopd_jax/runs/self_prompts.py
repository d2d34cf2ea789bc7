"""Prompts that a model writes itself: it continues an open user turn of its own chat template (arXiv 2406.08464).

They are spread as the model's own training data was, so they reach skills that no dataset of prompts at hand covers.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from camopd_jax.config.schema import Compute, Sampling, Template
from camopd_jax.data import prompt_set, templates
from camopd_jax.data.clusters import cluster, spread
from camopd_jax.data.files import RawRow
from camopd_jax.data.prompt_set import Manifest, SelectedPrompts
from camopd_jax.data.questions import normalised
from camopd_jax.data.recipes import Part, request
from camopd_jax.data.templates import Tokenizer
from camopd_jax.errors import UserError
from camopd_jax.evals.answer_file import AnswerFile, Save, answer_key
from camopd_jax.evals.runner import model_key
from camopd_jax.inference import loading
from camopd_jax.inference.answer import Answer, answer
from camopd_jax.inference.features import prompt_features
from camopd_jax.inference.loading import Loaded
from camopd_jax.method.statistics import repetition
from camopd_jax.runtime.distributed import broadcast
from camopd_jax.runtime.mesh import check_rows, make_mesh
from camopd_jax.runtime.progress import work

FILE = "prompts.jsonl"
NAME = "self"  # of the recipe, and of the source of its rows
MARK = "MARK0TEXT"  # stands for a user's text in the template
ATTEMPTS = 8  # texts that are sampled at most, for each prompt that is wanted
BATCHES = 4  # batches sampled at a time
REPEATED = 0.3  # largest share of a prompt's 4-grams of tokens that occurred earlier in it
LETTERS = 0.9  # smallest share of a prompt's letters that are in the wanted scripts
CANDIDATES = 2  # prompts that are written for each one that is kept, if they are spread over clusters
GRAM = 5  # words of the n-grams by which near-duplicates are recognised
SHARED = 0.5  # largest share of a prompt's n-grams that earlier prompts have
# How assistants begin, and users do not: the model has answered instead of asking
ANSWERS = re.compile(
    r"(i'?m sorry|i am sorry|i apologi[sz]e|sorry, (but )?i|i can('?t|not)|as an ai|i'?m an ai|i am an ai|sure[,!]|"
    r"certainly[,!]|of course[,!])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class SelfPrompting:
    """The settings of a set of such prompts."""

    model: str  # Hugging Face folder or hub name
    rows: int  # prompts wanted
    longest: int  # tokens; longer texts are dropped
    shortest: int  # words; shorter texts are dropped
    sampling: Sampling
    system: str | None  # system prompt before the user's turn
    batch_size: int
    seed: int
    scripts: tuple[str, ...] = ()  # of the letters, such as "latin", as Unicode names begin; (): any
    clusters: int = 0  # the prompts are spread over this many clusters; 0: as they are written


def build(settings: SelfPrompting, evaluations: Sequence[tuple[str, str]], out: Path) -> Manifest:
    """Loads the model and writes its prompts to a folder, as `write`.

    Raises:
      UserError: as `write`, and for a model that cannot be loaded.
    """
    check_rows(make_mesh(), "--batch_size", settings.batch_size)
    folder = loading.find(settings.model, "--model")
    compute = Compute()
    context = len(open_turn(templates.load_tokenizer(folder), settings.system).ids) + settings.longest
    loaded = loading.load(folder, make_mesh(), compute, dtype=loading.teacher_dtype(compute), context=context)
    return write(loaded, settings, evaluations, out)


def write(
    loaded: Loaded,
    settings: SelfPrompting,
    evaluations: Sequence[tuple[str, str]],
    out: Path,
    keep: epath.Path | None = None,
) -> Manifest:
    """Writes the model's prompts and manifest.json to a folder; every process calls it, and one writes.

    Args:
      evaluations: (source, split) of evaluation questions, which are left out.
      keep: folder for the sampled texts, with which an interrupted call continues; None: they are not kept.

    Returns:
      The manifest, as of a recipe of `data.recipe`.

    Raises:
      UserError: if the template has no user turn, and if no text is a prompt.
    """
    excluded, evaluation_facts = prompt_set.exclude(evaluations)
    turn = open_turn(loaded.tokenizer, settings.system)
    filters = Filters(settings)
    wanted = settings.rows * (CANDIDATES if settings.clusters else 1)
    part = Part(NAME, settings.model, wanted, request, split="", window=1)
    texts = filters.rows(_texts(loaded, turn, settings, keep))
    selected = prompt_set.select_prompts(part, texts, excluded, settings.seed)
    selected.read, selected.dropped = filters.read, selected.dropped + filters.dropped
    if not selected.prompts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in selected.dropped.items())
        raise UserError(
            f"{settings.model}: none of {selected.read} texts that it wrote is a prompt ({reasons}); give a file of "
            "prompts, or a model that was trained on users' turns too, or let the texts be longer"
        )
    part = replace(part, rows=settings.rows)
    if settings.clusters:
        _spread(selected, loaded, settings)
    origin = {"source": settings.model, "revision": f"weights:{loading.fingerprint(loaded.folder)}", "licence": None}
    parts = [prompt_set.part_facts(part, origin, selected)]
    rows = {FILE: selected.prompts.values()}
    return broadcast(lambda: prompt_set.write(out, rows, facts(settings), parts, evaluation_facts))


def facts(settings: SelfPrompting) -> Manifest:
    """The first fields of the manifest."""
    named = {"recipe": NAME, "seed": settings.seed, "sampling": vars(settings.sampling), "system": settings.system}
    named |= {"scripts": list(settings.scripts)} if settings.scripts else {}
    return named | ({"clusters": settings.clusters} if settings.clusters else {})


def _spread(selected: SelectedPrompts, loaded: Loaded, settings: SelfPrompting) -> None:
    """Keeps the wanted number of prompts, with the smallest cap on the prompts of a cluster that gives as many.

    The clusters are those of the model's own hidden states. The others are counted as dropped.
    """
    template = Template(system=settings.system)
    ids = loaded.reader.prompts([(row, f"text {n + 1}") for n, row in selected.prompts.items()], template)
    features = prompt_features(loaded, ids, batch_size=settings.batch_size)
    groups = cluster(features, settings.clusters, settings.seed)
    numbers = list(selected.prompts)
    kept = {numbers[i] for i in spread(groups, settings.rows)}
    selected.dropped["beyond its cluster's share"] += len(numbers) - len(kept)
    selected.prompts = {number: row for number, row in selected.prompts.items() if number in kept}


# --------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class OpenTurn:
    """The start of a conversation, up to where the user's text begins, and what ends the text."""

    ids: list[int]
    end: str  # the template's text after the user's
    end_id: int | None  # the token that ends the text, if it is a special one


def open_turn(tokenizer: Tokenizer, system: str | None) -> OpenTurn:
    """The open user turn of a chat template.

    Raises:
      UserError: for a tokenizer without chat template, and for a template in which nothing precedes a user's text.
    """
    row = {"messages": [{"role": "user", "content": MARK}]}
    text = templates.render(tokenizer, row, Template(system=system), open_answer=False)
    before, mark, after = text.partition(MARK)
    ids = templates.tokens(tokenizer, before)
    if not mark or not ids:
        raise UserError(f"{tokenizer.name_or_path}: its chat template has no beginning of a user's turn to continue")
    first = templates.tokens(tokenizer, after)[:1]
    special = [i for i in first if i in tokenizer.all_special_ids]
    return OpenTurn(ids, after.strip(), special[0] if special else None)


def _texts(
    loaded: Loaded, turn: OpenTurn, settings: SelfPrompting, keep: epath.Path | None = None
) -> Iterator[tuple[Answer, str]]:
    """Sampled texts, up to the end of the turn: `ATTEMPTS` for each prompt that is wanted or spread.

    Args:
      keep: folder of files with the texts of each few batches; those that are there are not sampled again.
    """
    ends = loaded.eos_ids if turn.end_id is None else tuple(sorted({*loaded.eos_ids, turn.end_id}))
    loaded, size = replace(loaded, eos_ids=ends), BATCHES * settings.batch_size
    wanted = settings.rows * (CANDIDATES if settings.clusters else 1)
    for start in range(0, ATTEMPTS * wanted, size):
        numbers = range(start, start + size)
        sample = partial(_sample, loaded, turn, settings)
        if keep is None:
            answers = sample(numbers)
        else:
            answers = _kept(keep / f"{start}.jsonl", [model_key(loaded), repr(settings), ends], numbers, sample)
        for one in answers:
            yield cut(one, turn)


Sample = Callable[..., list[Answer]]


def _sample(
    loaded: Loaded,
    turn: OpenTurn,
    settings: SelfPrompting,
    numbers: Sequence[int],
    on_batch: Callable[[dict[int, Answer]], None] = lambda answers: None,
) -> list[Answer]:
    """The texts with these numbers."""
    return answer(
        loaded,
        [turn.ids] * len(numbers),
        max_new=settings.longest,
        batch_size=settings.batch_size,
        sampling=settings.sampling,
        seed=settings.seed,
        rows=numbers,
        on_batch=on_batch,
    )


def _kept(file: epath.Path, way: list[Any], numbers: range, sample: Sample) -> list[Answer]:
    """The texts with these numbers, from the file or sampled now. `way`: JSON values that identify the texts."""
    keys = [answer_key(number, *way) for number in numbers]

    def compute(missing: list[int], save: Save) -> None:
        def on_batch(new: dict[int, Answer]) -> None:
            save({number - numbers.start: {"ids": one.ids, "response": one.text, "length": len(one.ids),
                                           "stopped": one.stopped, "entropy": one.entropy}
                  for number, one in new.items()})  # fmt: skip

        sample([numbers[i] for i in missing], on_batch)

    with work("sampling", len(keys), "texts") as sampling:
        rows = AnswerFile(file).complete(keys, compute, sampling)
    values = broadcast(lambda: [[row[name] for name in ("ids", "response", "stopped", "entropy")] for row in rows])
    return [Answer(ids, [], text, stopped, entropy) for ids, text, stopped, entropy in values]


def cut(one: Answer, turn: OpenTurn) -> tuple[Answer, str]:
    """A text without what follows the end of the turn, if that is in it as plain text."""
    text, end, _ = one.text.partition(turn.end) if turn.end else (one.text, "", "")
    return (replace(one, stopped=True) if end else one), text.strip()


# -------------------------------------------------------------------------------------- filtering


@dataclass
class Filters:
    """Leaves out texts that are no good prompts, and counts them by reason."""

    settings: SelfPrompting
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    grams: set[str] = field(default_factory=set)  # of the prompts so far

    def rows(self, texts: Iterator[tuple[Answer, str]]) -> Iterator[RawRow]:
        """The rows of the texts that are prompts, with their numbers as places."""
        for one, text in texts:
            self.read += 1
            if reason := self.reason(one, text):
                self.dropped[reason] += 1
            else:
                yield {"messages": [{"role": "user", "content": text}]}, f"text {self.read}"

    def reason(self, one: Answer, text: str) -> str | None:
        """Why a text is not a prompt; None if it is one, whose n-grams are then remembered."""
        words = normalised(text).split()
        if not one.stopped:
            return "not ended"
        if len(words) < self.settings.shortest:
            return "too short"
        if "\ufffd" in text or any(not c.isprintable() and not c.isspace() for c in text):
            return "unreadable"
        if self.settings.scripts and in_scripts(text, self.settings.scripts) < LETTERS:
            return "in another script"
        if repetition(np.asarray([one.ids]), np.asarray([len(one.ids)])) > REPEATED:
            return "repetitive"
        if ANSWERS.match(text):
            return "an answer"
        grams = {" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}
        if grams and len(grams & self.grams) > SHARED * len(grams):
            return "a near-duplicate"
        self.grams |= grams
        return None


def in_scripts(text: str, scripts: Sequence[str]) -> float:
    """The share of a text's letters that belong to these scripts; 1 for a text without letters.

    >>> in_scripts("ist 3 + 4 \u03b1?", ["latin"])
    0.75
    """
    scripts = tuple(script.upper() for script in scripts)
    letters = [unicodedata.name(c, "") for c in text if c.isalpha()]
    return sum(name.startswith(scripts) for name in letters) / len(letters) if letters else 1.0
