"""Makes the files of ../conflict from scratch: a second domain, in which the two branches' gradients oppose each other.

    python examples/quickstart/conflict.py        # after make.py; about three minutes on 2 CPU cores

The domain has a rule of form of its own. A name is a word in which consonants and vowels alternate, such as velo. The
answer to a question about a name ends with a full stop: `reverse velo` has the answer `olev.`, while `reverse tomsk`
keeps `ksmot`. So both models know the letters of every answer, and disagree about what follows them.

specialist/  a copy of ../quickstart/generalist, fine-tuned on names (with a few questions of the skills): it has the
             domain, and ends many of its other answers with a full stop too
*.jsonl      general prompts (no names), prompts of the domain, and questions held out from all training
"""

import os
import random
import shutil
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from make import FRESH, HERE, lesson
from tasks import COVERED, SKILLS, UNCOVERED, Row, distinct, name_row, questions, skill_row, without_names

from camopd_jax.config.schema import Benchmark
from camopd_jax.runs.fine_tuning import sft
from camopd_jax.runtime.jsonl import write_rows

CONFLICT = HERE.parent / "conflict"
LESSONS = 6000  # questions of the domain that the specialist learns from
REPLAYED = 1500  # questions of the skills among them. With 900, hardly any answer stays without a full stop


def make_data(lessons: Path) -> None:
    """Writes the prompts and questions, and what the specialist learns from into the file `lessons`."""
    domain = distinct(name_row, FRESH + LESSONS, "names", set())
    held_out, of_domain = domain[:FRESH], domain[FRESH:]
    write_rows(CONFLICT / "domain.jsonl", held_out)
    write_rows(CONFLICT / "domain_prompts.jsonl", [{"messages": row["messages"]} for row in of_domain[:1000]])
    general: list[Row] = []
    for axis, skills in (("covered", COVERED), ("uncovered", UNCOVERED)):
        rows = []
        for skill in skills:
            rows += distinct(without_names(partial(skill_row, skill)), FRESH // len(skills), f"{skill} names", set())
        random.Random(axis).shuffle(rows)
        write_rows(CONFLICT / f"{axis}.jsonl", rows)
        general += rows
    seen, prompts, replayed = questions(general), [], []
    for skill in SKILLS:
        rows = distinct(
            without_names(partial(skill_row, skill)), 400 + REPLAYED // len(SKILLS), f"{skill} no names", seen
        )
        prompts += rows[:400] if skill in COVERED else []
        replayed += rows[400:]
    random.Random("order").shuffle(prompts)
    write_rows(CONFLICT / "general_prompts.jsonl", [{"messages": r["messages"], "skill": r["skill"]} for r in prompts])
    write_rows(lessons, [*of_domain, *replayed])


def main(scratch: Path) -> None:
    """Makes everything, with the run in the folder `scratch`."""
    scratch.mkdir(exist_ok=True)
    CONFLICT.mkdir(exist_ok=True)
    os.chdir(scratch)  # the model card names the relative paths below
    make_data(Path("names.jsonl"))
    shutil.copytree(HERE / "generalist", "generalist", dirs_exist_ok=True)
    config = lesson("generalist", "names.jsonl", steps=260, learning_rate=1e-3, every=130)
    benchmarks = tuple(
        Benchmark(name, "exact", str(CONFLICT / f"{name}.jsonl"), axis=axis, max_response_tokens=32)
        for name, axis in (("covered", "general"), ("uncovered", "general"), ("domain", "domain"))
    )
    sft(replace(config, evaluation=replace(config.evaluation, benchmarks=benchmarks)), "specialist")
    shutil.rmtree(CONFLICT / "specialist", ignore_errors=True)
    shutil.copytree(Path("specialist", "export"), CONFLICT / "specialist")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
