"""The file of a prompt map, and the draws that follow from it.

A map has the mean gap between two models for each group of a branch's prompts. `runs.prompt_map` measures it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from camopd_jax.errors import UserError
from camopd_jax.runtime.jsonl import atomic_file


@dataclass(frozen=True)
class Group:
    """Prompts of one source or cluster."""

    name: str
    prompts: int
    answered: int  # prompts that the specialised model answered
    gap: float  # in nats per token: mean over answers of the mean over an answer's tokens
    error: float  # standard error of `gap` over answers
    examples: tuple[str, ...]  # some of its prompts


@dataclass(frozen=True)
class PromptMap:
    """Groups of a branch's prompts with their gaps."""

    branch: str
    source: str  # of the prompts
    digest: str  # of the tokenised prompts
    models: dict[str, str]  # names and fingerprints
    groups: tuple[Group, ...]
    group_of: tuple[int, ...]  # the number of each prompt's group, in the order of the stream's prompts

    @property
    def gap(self) -> tuple[float, float]:
        """The mean gap over all prompts in nats per token, and its standard error."""
        sizes = np.asarray([group.prompts for group in self.groups])
        shares = sizes / sizes.sum()
        errors = np.asarray([group.error for group in self.groups])
        return float(shares @ [group.gap for group in self.groups]), float(np.sqrt(np.sum((shares * errors) ** 2)))

    def draws(self) -> list[int]:
        """How often each group is drawn in as many draws as there are prompts: in proportion to its size times its gap.

        Raises:
          UserError: if no group has a gap.
        """
        weights = [group.prompts * max(group.gap, 0.0) for group in self.groups]
        if not sum(weights):
            raise UserError(f"the map of {self.branch}'s prompts has no gap above 0, which could weight them")
        return largest_remainder(weights, len(self.group_of))


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Integers in proportion to the weights, with this sum (Hamilton's method); the first of equal remainders win.

    >>> largest_remainder([0.5, 0.3, 0.2], 7)
    [4, 2, 1]
    """
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    return counts.tolist()


def even_turns(counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """The group of each of `sum(counts)` draws, and how often it was drawn before; each group at even distances.

    >>> even_turns([2, 4, 0])
    ([1, 0, 1, 1, 0, 1], [0, 0, 1, 2, 1, 3])
    """
    groups = np.repeat(np.arange(len(counts)), counts)
    nth = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((nth + 0.5) / np.asarray(counts)[groups], kind="stable")
    return groups[order].tolist(), nth[order].tolist()


def write(file: epath.Path | Path, made: PromptMap) -> None:
    """Writes a map as JSON."""
    with atomic_file(file) as stream:
        stream.write(json.dumps(asdict(made), indent=1) + "\n")


def read(file: epath.Path | Path, field: str) -> PromptMap:
    """The map in a file.

    Args:
      field: the config field that names it, for error messages.

    Raises:
      UserError: if there is no such file, or if it is no map.
    """
    try:
        made = from_json(json.loads(file.read_text()))
    except OSError as error:
        raise UserError(
            f'{field}: cannot read {file} ({error.strerror}); give "gap", or a file that `prompts map` wrote'
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{field}: {file} is not a map; `python -m camopd_jax.prompts map` writes one") from error
    if not made.groups or not set(made.group_of) <= set(range(len(made.groups))):
        raise UserError(f"{field}: {file} names groups that it does not have; make the map again")
    return made


def from_json(values: dict[str, Any]) -> PromptMap:
    """The inverse of `dataclasses.asdict`."""
    groups = tuple(Group(**group | {"examples": tuple(group["examples"])}) for group in values["groups"])
    return PromptMap(**values | {"groups": groups, "group_of": tuple(values["group_of"])})
