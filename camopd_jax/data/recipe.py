"""Builds a set of prompts: the paper's, from the hub or from local copies, or one's own.

    python -m camopd_jax.data.recipe medical --out=data/medical
    python -m camopd_jax.data.recipe roleplay --out=data/roleplay --source=coser=coser.jsonl
    python -m camopd_jax.data.recipe general --out=data/general --rows=2000
    python -m camopd_jax.data.recipe jsonl --out=data/mine --source=rows=notes.jsonl --against=eval.jsonl

The same command gives the same files: a sample is drawn by --seed, and a dataset of the hub is read at the revision
that manifest.json names. The manifest tells source, revision and licence of every part, the rows that were kept, and
those that were not and why. No prompt is among the questions of an evaluation: those of --against, by default all
benchmarks that camopd_jax knows.
"""

import hashlib
import heapq
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from absl import flags

from camopd_jax import __version__
from camopd_jax.data import sources
from camopd_jax.data.columns import Row
from camopd_jax.data.recipes import RECIPES, Part, Recipe
from camopd_jax.errors import UserError
from camopd_jax.evals.tasks import TASKS
from camopd_jax.runtime import cli
from camopd_jax.runtime.jsonl import atomic_file, write_rows

SHORT = 8  # words; a shorter question may be another one's with other options


def words(text: str) -> str:
    """A text by its words and numbers alone, in lower case: what two copies of a question share."""
    return " ".join(re.findall(r"\w+", text.lower()))


def keys(row: Row) -> set[str]:
    """What tells a question: all its words, and those before its options."""
    texts = [row["messages"][-1]["content"] if "messages" in row else row.get("prompt", "")]
    texts += [row["question"]] if isinstance(row.get("question"), str) else []
    stems = [re.split(r"\n\s*\(?A[.):]", text)[0] for text in texts]
    return {words(texts[0])} | {stem for stem in map(words, stems) if stem.count(" ") >= SHORT - 1}


@dataclass
class Taken:
    """What became of a part's rows."""

    prompts: list[tuple[int, Row]]  # by the row's number in its source
    read: int
    dropped: Counter


def take(part: Part, rows: Iterable[tuple[Any, str]], evaluated: set[str], seen: set[bytes], seed: int) -> Taken:
    """Chooses a part's prompts.

    Args:
      rows: raw, with their names.
      evaluated: keys of the questions that are not to be among them.
      seen: digests of the prompts met already; this part's join them.
    """
    best: list[tuple[Any, int, Row]] = []  # a heap; its least is the next to go
    dropped: Counter = Counter()
    read = usable = 0
    for number, (raw, where) in enumerate(rows):
        read += 1
        try:
            row = sources.checked(raw, where)
        except UserError:
            dropped["malformed"] += 1
            continue
        prompt = part.put(row)
        if prompt is None:
            dropped["no request"] += 1
        elif not evaluated.isdisjoint(keys(row)):
            dropped["an evaluation question"] += 1
        elif (digest := _digest(words(" ".join(message["content"] for message in prompt)))) in seen:
            dropped["a duplicate"] += 1
        else:
            seen.add(digest)
            usable += 1
            rank = part.rank(row) if part.rank else _lot(seed, part.name, number)
            kept: Row = {"id": f"{part.name}-{number}", "source": part.name, "messages": prompt}
            kept |= {"licence": row["license"]} if isinstance(row.get("license"), str) else {}
            item = ((rank, -number), number, kept)
            if len(best) < part.rows:
                heapq.heappush(best, item)
            else:
                heapq.heappushpop(best, item)
                dropped["not chosen"] += 1
            if part.window and usable >= part.window * part.rows:
                break
    return Taken(sorted(((number, kept) for _, number, kept in best), key=lambda kept: kept[0]), read, dropped)


def _lot(seed: int, part: str, number: int) -> int:
    return int.from_bytes(_digest(f"{seed}:{part}:{number}"))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def resized(recipe: Recipe, rows: int | None) -> Recipe:
    """The recipe with so many prompts in all, in the same proportions (largest remainders)."""
    if rows is None:
        return recipe
    total = sum(part.rows for part in recipe.parts)
    shares = [part.rows * rows / total for part in recipe.parts]
    counts = [int(share) for share in shares]
    for i in sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])[: rows - sum(counts)]:
        counts[i] += 1
    parts = [replace(part, rows=n) for part, n in zip(recipe.parts, counts, strict=True) if n]
    return replace(recipe, parts=tuple(parts))


def origin(source: str, field: str) -> tuple[str, dict[str, Any]]:
    """The source to read, pinned to a revision, and what the manifest says of it."""
    if not all(sources.is_file(name) for name in source.split(",")):
        pinned, licence = sources.resolved(source, field)
        return pinned, {"source": pinned.split("@")[0], "revision": pinned.split("@")[1], "licence": licence}
    digest = hashlib.sha256()
    for name in source.split(","):
        try:
            with Path(name.strip()).expanduser().open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)
        except OSError as error:
            raise UserError(
                f"{field}: cannot read {name} ({error.strerror}); give a .jsonl or .parquet file"
            ) from error
    return source, {"source": source, "revision": f"sha256:{digest.hexdigest()}", "licence": None}


def evaluation_keys(against: list[tuple[str, str]]) -> tuple[set[str], list[dict[str, Any]]]:
    """Keys of all evaluation questions, and the sources for the manifest."""
    found: set[str] = set()
    told = []
    for source, split in against:
        source, facts = origin(source, "--against")
        rows = sources.read(source, split, field="--against")
        found |= set().union(*(keys(row) for row in rows))
        told.append(facts | {"split": split, "questions": len(rows)})
    return found, told


def build(recipe: Recipe, name: str, out: Path, against: list[tuple[str, str]], seed: int) -> dict[str, Any]:
    """Writes the recipe's files and its manifest to `out`; returns the manifest."""
    evaluated, told_of_evaluations = evaluation_keys(against)
    seen: set[bytes] = set()
    prompts: list[Row] = []
    rest: list[Iterator[Row]] = []
    told = []
    for part in recipe.parts:
        field = f"--source={part.name}"
        source, facts = origin(part.source, field)
        taken = take(part, sources.stream(source, part.split, field), evaluated, seen, seed)
        prompts += [row for _, row in taken.prompts]
        rest.append(_whole(part, source, evaluated, {number for number, _ in taken.prompts}))
        licences = Counter(row["licence"] for _, row in taken.prompts if "licence" in row)
        told.append(
            {"part": part.name, **facts, "split": part.split, "asked": part.rows, "kept": len(taken.prompts),
             "read": taken.read, "dropped": dict(sorted(taken.dropped.items()))}
            | ({"licences": dict(licences.most_common())} if licences else {})
        )  # fmt: skip
    if not prompts:
        raise UserError(
            f"{name}: no row of its sources is a prompt; camopd_jax/data/columns.py lists the columns known"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / recipe.file, prompts)
    if recipe.rest:
        write_rows(out / recipe.rest, itertools.chain(*rest))
    manifest = {
        "recipe": name,
        "seed": seed,
        "camopd_jax": __version__,
        "files": {file: _sha256(out / file) for file in (recipe.file, recipe.rest) if file},
        "removed_as_evaluation": sum(part["dropped"].get("an evaluation question", 0) for part in told),
        "parts": told,
        "against": told_of_evaluations,
    }
    with atomic_file(out / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _whole(part: Part, source: str, evaluated: set[str], taken: set[int]) -> Iterator[Row]:
    """The conversations that were not taken, with their last turn: what a model may be fine-tuned on before."""
    for number, (raw, where) in enumerate(sources.stream(source, part.split, part.name)):
        try:
            row = sources.checked(raw, where)
        except UserError:
            continue
        if number not in taken and part.put(row) is not None and evaluated.isdisjoint(keys(row)):
            yield {"id": f"{part.name}-{number}", "source": part.name, "messages": row["messages"]}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def with_sources(recipe: Recipe, given: list[str]) -> Recipe:
    """The recipe with other sources: "PART=SOURCE", several with commas between them."""
    replaced = {}
    for text in given:
        name, _, source = text.partition("=")
        if name not in {part.name for part in recipe.parts} or not source:
            raise UserError(
                f"--source={text}: give PART=FILE, where PART is {' or '.join(p.name for p in recipe.parts)}"
            )
        replaced[name] = source
    parts = [replace(part, source=replaced.get(part.name, part.source)) for part in recipe.parts]
    for part in parts:
        if not part.source:
            raise UserError(f"--source is missing; give --source={part.name}=FILE.jsonl")
    return replace(recipe, parts=tuple(parts))


def tell(manifest: dict[str, Any], out: Path) -> None:
    for part in manifest["parts"]:
        dropped = ", ".join(f"{count} {reason}" for reason, count in part["dropped"].items())
        short = f", {part['asked'] - part['kept']} fewer than asked" if part["kept"] < part["asked"] else ""
        print(
            f"{part['part']}: {part['kept']} of {part['read']} rows{short}" + (f" (not: {dropped})" if dropped else "")
        )
    print(f"{manifest['removed_as_evaluation']} evaluation questions removed; written: {out}")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder for the prompts and manifest.json, made if it is not there.")
    flags.DEFINE_multi_string("source", [], "PART=SOURCE: other files or another dataset for a part; may come again.")
    flags.DEFINE_list("against", None, "Evaluation questions: files or datasets (their split test). Default: every "
                      "benchmark's own dataset, from the hub. --against= : none.")  # fmt: skip
    flags.DEFINE_integer("rows", None, "Prompts in all, in the recipe's proportions. Default: the recipe's.", 1)
    flags.DEFINE_integer("seed", 0, "Of the sample.")

    def main(name: str) -> None:
        out = Path(cli.required("out", f"data/{name}"))
        if name not in RECIPES:
            raise UserError(f"no recipe {name}; there are {', '.join(RECIPES)}")
        values = flags.FLAGS
        recipe = resized(with_sources(RECIPES[name], values.source), values.rows)
        own = [(task.dataset, task.split) for task in TASKS.values() if task.dataset]
        against = own if values.against is None else [(source, "test") for source in values.against if source]
        tell(build(recipe, name, out, against, values.seed), out)

    cli.run(main, "NAME")
