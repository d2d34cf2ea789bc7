"""The questions of the quickstart: six text skills, and a pharmacopoeia that does not exist.

A question of a skill is `reverse tomas`, its answer `samot`. A question of the domain is a choice of four,
`velo treats? A skin B lung C bone D ear`, its answer `lung. Final answer: B`. The model has to know the remedy, because
the letters and the wrong options are random in each question.
"""

import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Maker = Callable[[random.Random], Row]  # of a random question

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ORGANS = ("skin", "lung", "bone", "ear", "eye", "heart", "liver", "nose")

# Skills in the general prompts, and skills that are left out of them: no set of prompts covers every skill.
COVERED = ("reverse", "sort", "shift", "add")
UNCOVERED = ("double", "swap")
NAME_SKILLS = tuple(skill for skill in (*COVERED, *UNCOVERED) if skill != "add")  # of the second domain


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 5)))


def _swap(word: str) -> str:
    pairs = [word[i : i + 2] for i in range(0, len(word), 2)]
    return "".join(pair[::-1] for pair in pairs)


SKILLS: dict[str, Callable[[str], str]] = {
    "reverse": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "shift": lambda word: "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in word),
    "double": lambda word: "".join(c + c for c in word),
    "swap": _swap,
    "add": lambda sum_: "".join(str(int(a) + int(b)) for a, b in zip(*sum_.split("+"), strict=True)),
}


def _sum(rng: random.Random) -> str:
    """A sum of two numbers of one length, without a carry: this small a model does not learn to carry."""
    columns = [(a, rng.randint(0, 9 - a)) for a in (rng.randint(0, 9) for _ in range(rng.randint(2, 4)))]
    first, second = ("".join(map(str, digits)) for digits in zip(*columns, strict=True))
    return f"{first}+{second}"


def skill_row(skill: str, rng: random.Random) -> Row:
    """A random question of a skill."""
    text = _sum(rng) if skill == "add" else _word(rng)
    return _row(f"{skill} {text}", SKILLS[skill](text), skill)


def remedies(count: int = 40) -> dict[str, str]:
    """The pharmacopoeia: {remedy: organ}."""
    rng = random.Random("pharmacopoeia")
    syllables = [a + b for a in "bdfklmnprstvz" for b in "aeiou"]
    names: list[str] = []
    while len(names) < count:
        name = rng.choice(syllables) + rng.choice(syllables)
        if name not in names:
            names.append(name)
    return {name: ORGANS[i % len(ORGANS)] for i, name in enumerate(names)}


def domain_row(rng: random.Random) -> Row:
    """A random question of the domain."""
    remedy, organ = rng.choice(list(remedies().items()))
    options = [organ, *rng.sample([o for o in ORGANS if o != organ], 3)]
    rng.shuffle(options)
    letter = "ABCD"[options.index(organ)]
    shown = " ".join(f"{a} {b}" for a, b in zip("ABCD", options, strict=True))
    return _row(f"{remedy} treats? {shown}", f"{organ}. Final answer: {letter}", "domain") | {"letter": letter}


def domain_questions() -> tuple[list[Row], list[Row]]:
    """Those of the quickstart's benchmark, and those that its specialist learnt from."""
    held_out = distinct(domain_row, 192, "domain held out", set())
    return held_out, distinct(domain_row, 6000, "domain lessons", questions(held_out))


def is_name(word: str) -> bool:
    """Whether consonants and vowels alternate, from a consonant on."""
    return all((letter in "aeiou") == (i % 2 == 1) for i, letter in enumerate(word))


def name_row(rng: random.Random) -> Row:
    """A random question of the second domain (conflict.py): a skill on a name, and a full stop after the answer."""
    consonants = [letter for letter in LETTERS if letter not in "aeiou"]
    name = "".join(rng.choice("aeiou" if i % 2 else consonants) for i in range(rng.randint(3, 5)))
    skill = rng.choice(NAME_SKILLS)
    return _row(f"{skill} {name}", SKILLS[skill](name) + ".", "domain")


def without_names(make: Maker) -> Maker:
    """The same questions, but for those about a name."""

    def make_other(rng: random.Random) -> Row:
        while is_name(_text(row := make(rng)).split()[-1]):
            pass
        return row

    return make_other


def _row(question: str, answer: str, skill: str) -> Row:
    return {"messages": [{"role": "user", "content": question}], "answer": answer, "skill": skill}


def distinct(make: Maker, count: int, seed: str, without: set[str]) -> list[Row]:
    """`count` rows with different questions, none of them in `without`."""
    rng, seen = random.Random(seed), set(without)
    rows: list[Row] = []
    while len(rows) < count:
        row = make(rng)
        question = _text(row)
        if question not in seen:
            seen.add(question)
            rows.append(row)
    return rows


def questions(rows: list[Row]) -> set[str]:
    """The texts of the rows' questions."""
    return {_text(row) for row in rows}


def _text(row: Row) -> str:
    text: str = row["messages"][0]["content"]
    return text
