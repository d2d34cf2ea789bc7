"""Builds a recipe's prompt set: selects rows of its datasets, and writes them with a manifest of their origin.

A prompt set has no evaluation questions and no duplicates. The same recipe, seed and revisions give the same files.
"""

import hashlib
import heapq
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camopd_jax import __version__
from camopd_jax.data import sources
from camopd_jax.data.columns import Row
from camopd_jax.data.files import KINDS, RawRow
from camopd_jax.data.questions import normalised, question_keys
from camopd_jax.data.recipes import Part, Recipe
from camopd_jax.data.templates import Messages
from camopd_jax.errors import UserError
from camopd_jax.models.checksums import sha256
from camopd_jax.runtime.jsonl import atomic_file, write_rows
from camopd_jax.runtime.paths import in_home

Manifest = dict[str, Any]

# ----------------------------------------------------------------------------------- selecting rows


@dataclass
class Excluded:
    """Texts that must not become prompts."""

    questions: set[str]  # keys of the evaluation questions
    prompts: set[bytes] = field(default_factory=set)  # digests of the prompts so far


@dataclass
class SelectedPrompts:
    """The selected prompts of a part, and counts of the rows that were read."""

    prompts: dict[int, Row] = field(default_factory=dict)  # by row number in the source, ascending
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # rows by reason
    malformed: str | None = None  # the first malformed row's file and line, and what is wrong with it


def select_prompts(part: Part, rows: Iterable[RawRow], excluded: Excluded, seed: int) -> SelectedPrompts:
    """Selects the prompts of a part: those with the highest rank, or a random sample.

    Args:
      rows: of the part's source, unchecked.
      excluded: the part's usable prompts are added to it.
      seed: for the random sample.
    """
    selected = SelectedPrompts()
    usable = _usable(part, rows, excluded, selected)
    limit = part.window * part.rows if part.window else None
    best: list[tuple[tuple[int, int], Row]] = []  # a heap of ((rank, -number), prompt)
    for number, row, messages in itertools.islice(usable, limit):
        rank = part.rank(row) if part.rank else _random_rank(seed, part.name, number)
        prompt: Row = {"id": f"{part.name}-{number}", "source": part.name, "messages": messages}
        prompt |= {"licence": row["license"]} if isinstance(row.get("license"), str) else {}
        prompt |= {"tools": row["tools"]} if "tools" in row else {}
        heapq.heappush(best, ((rank, -number), prompt))
        if len(best) > part.rows:
            heapq.heappop(best)
            selected.dropped["not chosen"] += 1
    selected.prompts = dict(sorted((-negative, prompt) for (_, negative), prompt in best))
    return selected


def _usable(
    part: Part, rows: Iterable[RawRow], excluded: Excluded, selected: SelectedPrompts
) -> Iterator[tuple[int, Row, Messages]]:
    """Number, row and prompt of each row that can be selected. Counts all rows in `selected`."""
    for number, (raw, where) in enumerate(rows):
        selected.read += 1
        try:
            row = sources.checked(raw, where)
            with sources.naming(where):
                messages = part.prompt(row)
        except UserError as error:
            selected.dropped["malformed"] += 1
            selected.malformed = selected.malformed or str(error)
            continue
        if messages is None:
            selected.dropped["no request"] += 1
        elif not excluded.questions.isdisjoint(question_keys(row)):
            selected.dropped["an evaluation question"] += 1
        elif (digest := _digest(normalised(" ".join(m["content"] for m in messages)))) in excluded.prompts:
            selected.dropped["a duplicate"] += 1
        else:
            excluded.prompts.add(digest)
            yield number, row, messages


def _random_rank(seed: int, part: str, number: int) -> int:
    """The random rank of a row depends only on its number, so a sample does not depend on the other rows."""
    return int.from_bytes(_digest(f"{seed}:{part}:{number}"))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


# --------------------------------------------------------------------------------- writing the set


def build(recipe: Recipe, name: str, out: Path, evaluations: Sequence[tuple[str, str]], seed: int) -> Manifest:
    """Writes a recipe's files and manifest.json to a folder.

    Args:
      name: of the recipe, for the manifest.
      evaluations: (source, split) of the evaluation questions.
      seed: for the random samples.

    Returns:
      The manifest: source, revision and licence of every part, and the numbers of selected and dropped rows.

    Raises:
      UserError: for a source that cannot be read, and if no row has a prompt.
    """
    excluded, evaluation_facts = exclude(evaluations)
    prompts: list[Row] = []
    rest: list[Iterator[Row]] = []
    parts = []
    for part in recipe.parts:
        source, origin_facts = origin(part.source, f"--source={part.name}")
        rows = sources.stream(source, part.split, f"--source={part.name}")
        selected = select_prompts(part, rows, excluded, seed)
        prompts += selected.prompts.values()
        rest.append(_conversations_left(part, source, excluded.questions, selected.prompts.keys()))
        parts.append(part_facts(part, origin_facts, selected))
    if not prompts:
        first = next((f"; first {part['first_malformed']}" for part in parts if "first_malformed" in part), "")
        raise UserError(
            f"{name}: no row of its sources contains a prompt; docs/inputs.md describes the forms of rows{first}"
        )
    files: dict[str, Iterable[Row]] = {recipe.file: prompts}
    files |= {recipe.rest: itertools.chain(*rest)} if recipe.rest else {}
    return write(out, files, {"recipe": name, "seed": seed}, parts, evaluation_facts)


def write(
    out: Path,
    files: Mapping[str, Iterable[Row]],
    facts: Manifest,
    parts: Sequence[dict[str, Any]],
    evaluation_facts: Sequence[dict[str, Any]],
) -> Manifest:
    """Writes the files of a prompt set and its manifest.json to a folder; returns the manifest.

    Args:
      facts: the first fields of the manifest.
      parts, evaluation_facts: results of `part_facts` and `exclude`.
    """
    out.mkdir(parents=True, exist_ok=True)
    for file, rows in files.items():
        write_rows(out / file, rows)
    manifest = {
        **facts,
        "camopd_jax": __version__,
        "files": {file: sha256(out / file) for file in files},
        "removed_as_evaluation": sum(part["dropped"].get("an evaluation question", 0) for part in parts),
        "parts": parts,
        "against": evaluation_facts,
    }
    with atomic_file(out / "manifest.json") as stream:
        stream.write(json.dumps(manifest, indent=2) + "\n")
    return manifest


def exclude(evaluations: Sequence[tuple[str, str]]) -> tuple[Excluded, list[dict[str, Any]]]:
    """The questions of all evaluations, and the manifest's entry for each evaluation.

    Args:
      evaluations: source and split of each evaluation.
    """
    keys: set[str] = set()
    facts = []
    for source, split in evaluations:
        source, origin_facts = origin(source, "--against")
        rows = sources.read(source, split, field="--against")
        keys |= set().union(*(question_keys(row) for row in rows))
        facts.append(origin_facts | {"split": split, "questions": len(rows)})
    return Excluded(keys), facts


def origin(source: str, field: str) -> tuple[str, dict[str, Any]]:
    """The source with a fixed revision, and its "source", "revision" and "licence" for the manifest.

    Args:
      field: the flag that names the source, for error messages.

    Raises:
      UserError: if there is no such file or dataset.
    """
    if not all(map(sources.is_file, sources.names(source))):
        pinned, licence = sources.pinned(source, field)
        name, revision = pinned.split("@")
        return pinned, {"source": name, "revision": revision, "licence": licence}
    digest = hashlib.sha256()
    for name in sources.names(source):
        try:
            with in_home(name).open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)
        except OSError as error:
            raise UserError(f"{field}: cannot read {name} ({error.strerror}); give {KINDS}") from error
    return source, {"source": source, "revision": f"sha256:{digest.hexdigest()}", "licence": None}


def part_facts(part: Part, origin_facts: dict[str, Any], selected: SelectedPrompts) -> dict[str, Any]:
    """A part's entry in the manifest. `origin_facts`: its "source", "revision" and "licence"."""
    facts = {
        "part": part.name,
        **origin_facts,
        "split": part.split,
        "asked": part.rows,
        "kept": len(selected.prompts),
        "read": selected.read,
        "dropped": dict(sorted(selected.dropped.items())),
    }
    facts |= {"first_malformed": selected.malformed} if selected.malformed else {}
    licences = Counter(row["licence"] for row in selected.prompts.values() if "licence" in row)
    return facts | ({"licences": dict(licences.most_common())} if licences else {})


def _conversations_left(part: Part, source: str, evaluated: set[str], selected: Collection[int]) -> Iterator[Row]:
    """The conversations that were not selected, including their last turn."""
    for number, (raw, where) in enumerate(sources.stream(source, part.split, part.name)):
        try:
            row = sources.checked(raw, where)
            is_left = number not in selected and part.prompt(row) is not None
        except UserError:
            continue
        if is_left and evaluated.isdisjoint(question_keys(row)):
            tools = {"tools": row["tools"]} if "tools" in row else {}
            yield {"id": f"{part.name}-{number}", "source": part.name, "messages": row["messages"], **tools}


def summary(manifest: Manifest, out: Path) -> str:
    """The output of the command: a line for each part, then the number of removed questions and the folder."""
    lines = []
    for part in manifest["parts"]:
        fewer = f", {part['asked'] - part['kept']} fewer than asked" if part["kept"] < part["asked"] else ""
        dropped = ", ".join(f"{count} {reason}" for reason, count in part["dropped"].items())
        reasons = f" (not: {dropped})" if dropped else ""
        lines.append(f"{part['part']}: {part['kept']} of {part['read']} rows{fewer}{reasons}")
        if "first_malformed" in part:
            lines.append(f"  malformed, first {part['first_malformed']}")
    lines.append(f"{manifest['removed_as_evaluation']} evaluation questions removed; written: {out}")
    return "\n".join(lines)
