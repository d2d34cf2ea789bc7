"""Streams of batches, by grain: shuffled in each epoch, the same for any number of processes.

Every process iterates over the same global order of batches and makes only its own rows. So a stream's position is one
number, and a run can be resumed with another number of processes.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grain
import numpy as np
from etils import epath

from camopd_jax.config.schema import RolloutConfig, SftConfig, Stream
from camopd_jax.data import answers, prompt_map, sources, templates, token_cache
from camopd_jax.data.answers import Unlearnable
from camopd_jax.data.prompt_map import PromptMap, even_turns
from camopd_jax.data.templates import Reader, Tokenizers
from camopd_jax.errors import UserError
from camopd_jax.runtime.buckets import bucket
from camopd_jax.runtime.progress import work
from camopd_jax.types import PromptBatch, Prompts, Rollout, Sequences

SELF = "self"  # value of a stream's `source`: the branch's teacher writes the prompts in the run
GAP = "gap"  # value of a stream's `weights`: by a map that the run makes
FIRST = 16  # rows of a stream that are kept as examples
AT_ONCE = 1024  # rows whose texts are tokenised together

BatchT = TypeVar("BatchT")


def pad(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """int32[len(rows), width], right-padded with 0."""
    padded = np.zeros((len(rows), width), np.int32)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = row
    return padded


def pad_prompts(rows: Sequence[Sequence[int]], width: int) -> Prompts:
    """Right-padded host arrays of token lists; `width` in tokens."""
    lengths = np.asarray([len(row) for row in rows], np.int32)
    return Prompts(pad(rows, width), lengths)  # type: ignore[arg-type]  # host arrays, for `global_rows`


class BatchStream(Generic[BatchT]):
    """An endless iterator of batches, whose position can be saved and restored."""

    def __init__(self, rows: int, batch_size: int, seed: int, make: Callable[[np.ndarray], BatchT]):
        """Shuffles `rows` row numbers with `seed` in every epoch.

        Args:
          make: makes a batch from the row numbers of the global batch, int[batch_size].
        """
        self._batch_size, self._seed, self._make = batch_size, seed, make
        self._serve(self._shuffled(range(rows)))

    def _shuffled(self, numbers: Sequence[int]) -> grain.MapDataset[int]:
        """Row numbers without end, shuffled in every epoch."""
        return grain.MapDataset.source(numbers).seed(self._seed).shuffle().repeat(None)

    def _serve(self, order: grain.MapDataset[int]) -> None:
        """Starts with the first batch of this order of row numbers."""
        # drop_remainder: else grain's number of batches, a float, overflows for batches of one row
        batches = order.batch(self._batch_size, drop_remainder=True).map(lambda rows: self._make(np.asarray(rows)))
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def __iter__(self) -> "BatchStream[BatchT]":
        return self

    def __next__(self) -> BatchT:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position as JSON values."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a result of `get_state`."""
        self._iterator.set_state(state)


def counts_line(counts: Mapping[str, int]) -> str:
    """The numbers of a stream's rows in words; of those that are not served, only those that exist.

    >>> counts_line({"kept": 1600, "dropped": 12, "truncated": 0})
    '1,600 used, 12 dropped as too long'
    """
    words = {"kept": "used", "dropped": "dropped as too long", "truncated": "of them cut to the longest length"}
    words |= {"unlearnable": "left out because no answer can be learnt", "answered": "answered by the teacher"}
    first, *others = [f"{count:,} {words[name]}" for name, count in counts.items() if count or name == "kept"]
    return ", ".join([first, *others])


def _digest(rows: Iterable[Any]) -> str:
    """Of tokenised rows in their order: it names what a stream serves."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class TokenisedPrompt:
    """The tokens of a prompt for both models."""

    index: int  # row number in the source
    student: list[int]
    teacher: list[int]

    @property
    def values(self) -> tuple[int, list[int], list[int]]:
        return self.index, self.student, self.teacher


class PromptStream(BatchStream[PromptBatch]):
    """A stream of `PromptBatch`es with this process's rows.

    `prompts` has all prompts, `first` a few of them. `counts` has the numbers of kept, dropped and truncated prompts.
    `lengths`, int[kept], has the prompts' lengths in tokens with the student's template. `digest` identifies the rows.
    """

    def __init__(
        self,
        stream: Stream,
        rollout: RolloutConfig,
        tokenizers: Tokenizers,
        seed: int,
        own_rows: Sequence[int] | np.ndarray,
        field: str,
    ):
        """Reads and tokenises every prompt.

        Args:
          rollout: gives `batch_size`, `answers_per_prompt`, `max_prompt_tokens` and `smallest_bucket`.
          seed: for the order of the prompts.
          own_rows: numbers of the rows of a global batch that this process makes.
          field: the config field of the stream, for error messages.

        Raises:
          UserError: for malformed rows, and if all prompts are too long.
        """
        cap = rollout.max_prompt_tokens
        prompts, self.counts = tokenise(stream, tokenizers, cap, field)
        self.prompts = prompts
        self.lengths = np.asarray([len(prompt.student) for prompt in prompts])
        self.digest = _digest(prompt.values for prompt in prompts)
        self.first = prompts[:FIRST]

        def make(numbers: np.ndarray) -> PromptBatch:
            rows = np.repeat(numbers, rollout.answers_per_prompt)  # the answers to a prompt are consecutive
            return _prompt_batch([prompts[i] for i in rows], own_rows, rollout)

        super().__init__(len(prompts), rollout.batch_size, seed, make)
        if stream.weights not in ("", GAP):
            self.weigh(prompt_map.read(epath.Path(stream.weights).expanduser(), f"{field}.weights"), f"{field}.weights")

    def weigh(self, made: PromptMap, field: str) -> None:
        """Draws from the groups of a map in proportion to their size times their gap, starting anew.

        The groups take turns evenly, so that every part of the stream has about their proportions, and as many draws
        as there are prompts have them exactly. The prompts of a group are shuffled in every epoch of its own.

        Raises:
          UserError: if the map is not one of these prompts.
        """
        if made.digest != self.digest:
            raise UserError(
                f"{field}: the map was made for other prompts, templates or tokenizers than these; make it again with "
                "`python -m camopd_jax.prompts map`"
            )
        draws, group_of = made.draws(), np.asarray(made.group_of)
        groups = [self._shuffled(np.flatnonzero(group_of == number).tolist()) for number in range(len(draws))]
        turns, nth, total = *even_turns(draws), sum(draws)

        def number(draw: int, turn: int) -> int:
            group = turns[turn]
            return groups[group][draw // total * draws[group] + nth[turn]]

        self.digest = _digest([self.digest, made.group_of, draws])
        self._serve(grain.MapDataset.range(total).repeat(None).map_with_index(number))


def _prompt_batch(
    batch: Sequence[TokenisedPrompt], own_rows: Sequence[int] | np.ndarray, rollout: RolloutConfig
) -> PromptBatch:
    """This process's rows of a global batch."""
    own = [batch[i] for i in own_rows]

    def padded(side: str) -> Prompts:
        longest = max(len(getattr(prompt, side)) for prompt in batch)  # the width is the same on all processes
        width = min(rollout.max_prompt_tokens, bucket(longest, rollout.smallest_bucket))
        return pad_prompts([getattr(prompt, side) for prompt in own], width)

    index = np.asarray([prompt.index for prompt in own], np.int32)
    return PromptBatch(padded("student"), padded("teacher"), index)  # type: ignore[arg-type]  # a host array


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt with an answer that its branch's teacher sampled."""

    prompt: TokenisedPrompt
    ids: list[int]  # of the answer, with a final EOS if there is one
    entropy: float  # of the next-token distribution in nats, mean over the answer's tokens
    stopped: bool  # True: ended with EOS; False: cut at the maximum length


class AnsweredStream(BatchStream[PromptBatch]):
    """A stream of `PromptBatch`es with given answers; attributes as of `PromptStream`."""

    def __init__(
        self,
        rows: Sequence[AnsweredPrompt],
        rollout: RolloutConfig,
        seed: int,
        own_rows: Sequence[int] | np.ndarray,
    ):
        """Arguments as of `PromptStream`."""
        self.prompts, self.counts = [row.prompt for row in rows], {"answered": len(rows)}
        self.digest = _digest((*row.prompt.values, row.ids) for row in rows)
        self.first = self.prompts[:FIRST]

        def make(numbers: np.ndarray) -> PromptBatch:
            batch = [rows[i] for i in numbers]
            own = [batch[i] for i in own_rows]
            width = bucket(max(len(row.ids) for row in batch), rollout.smallest_bucket)
            width = min(width, rollout.max_response_tokens)
            arrays: dict[str, Any] = {  # on the host
                "tokens": pad([row.ids for row in own], width),
                "lengths": np.asarray([len(row.ids) for row in own], np.int32),
                "log_probs": np.zeros((len(own), width), np.float32),  # not known, and not needed for given answers
                "entropy": np.asarray([row.entropy for row in own], np.float32),
                "stopped": np.asarray([row.stopped for row in own]),
            }
            prompts = _prompt_batch([row.prompt for row in batch], own_rows, rollout)
            return prompts.replace(answers=Rollout(**arrays))

        super().__init__(len(rows), rollout.batch_size, seed, make)


def tokenise(
    stream: Stream, tokenizers: Tokenizers, cap: int, field: str
) -> tuple[list[TokenisedPrompt], dict[str, int]]:
    """The prompts of a stream, and the numbers of "kept", "dropped" and "truncated" ones.

    Args:
      cap: maximum length of a prompt in tokens, for both templates.
      field: the config field of the stream, for error messages.

    Raises:
      UserError: for malformed rows, and if all prompts are too long.
    """
    if stream.source == SELF:
        raise UserError(
            f"{field}.source is {SELF!r}: prompts that only a run of `train` writes; write them with "
            "`python -m camopd_jax.prompts self` and name the file"
        )
    key = token_cache.key(stream, tokenizers, cap)
    if key is not None and (kept := token_cache.read(key)):
        rows, counts = kept
        return [TokenisedPrompt(*row) for row in rows], counts
    started = time.perf_counter()
    prompts, counts = _tokenise(stream, tokenizers, cap, field)
    if not prompts:
        raise UserError(
            f"{field}.source: none of its prompts fits config.rollout.max_prompt_tokens = {cap}; raise it, "
            f'or set {field}.too_long to "truncate"'
        )
    if key is not None and time.perf_counter() - started > token_cache.SECONDS:
        token_cache.write(key, [prompt.values for prompt in prompts], counts)
    return prompts, counts


def _tokenise(
    stream: Stream, tokenizers: Tokenizers, cap: int, field: str
) -> tuple[list[TokenisedPrompt], dict[str, int]]:
    student, teacher = tokenizers.student, tokenizers.teacher
    teacher_template = stream.teacher_template or stream.template
    same = tokenizers.read_alike and teacher_template == stream.template
    counts = {"kept": 0, "dropped": 0, "truncated": 0}
    prompts = []
    rows = sources.read_located(stream.source, stream.split, stream.limit, f"{field}.source")
    with work(f"tokenising {stream.source}", len(rows), "rows") as tokenising:
        for start in range(0, len(rows), AT_ONCE):
            some = rows[start : start + AT_ONCE]
            of_students = student.prompts(some, stream.template)
            of_teachers = of_students if same else teacher.prompts(some, teacher_template)
            for index, (of_student, of_teacher) in enumerate(zip(of_students, of_teachers, strict=True), start):
                too_long = max(len(of_student), len(of_teacher)) > cap
                if too_long and stream.too_long == "drop":
                    counts["dropped"] += 1
                    continue
                counts["truncated"] += too_long
                ids = of_student[-cap:]
                prompts.append(TokenisedPrompt(index, ids, ids if same else of_teacher[-cap:]))
            tokenising.add(len(some))
    counts["kept"] = len(prompts)
    return prompts, counts


# ---------------------------------------------------------------------------------- conversations


class SftStream(BatchStream[Sequences]):
    """A stream of `Sequences` for supervised fine-tuning, with this process's rows.

    `counts` has the numbers of conversations that are kept, dropped as too long, and left out as `Unlearnable`;
    `warnings` says what is unusual. `digest` identifies the rows, `first` has the token ids of a few of them.
    """

    def __init__(self, config: SftConfig, reader: Reader, own_rows: Sequence[int] | np.ndarray):
        """Reads and tokenises every conversation.

        Args:
          own_rows: numbers of the rows of a global batch that this process makes.

        Raises:
          UserError: for malformed rows, and if all conversations are too long.
        """
        pairs, self.counts, self.warnings = _conversations(config, reader)
        self.digest = _digest(pairs)
        self.first = [[*prompt, *answer] for prompt, answer in pairs[:FIRST]]

        def make(numbers: np.ndarray) -> Sequences:
            batch = [pairs[i] for i in numbers]

            def padded(side: int) -> Prompts:
                width = bucket(max(len(pair[side]) for pair in batch), config.smallest_bucket)
                return pad_prompts([batch[i][side] for i in own_rows], width)

            prompts, answers = padded(0), padded(1)
            return Sequences(prompts, answers.tokens, answers.lengths)

        super().__init__(len(pairs), config.batch_size, config.seed, make)


def _conversations(
    config: SftConfig, reader: Reader
) -> tuple[list[tuple[list[int], list[int]]], dict[str, int], list[str]]:
    """The token ids of each prompt and its answer; how many were "kept", "dropped" and "unlearnable"; warnings."""
    data = config.data
    pairs = []
    counts = {"kept": 0, "dropped": 0, "unlearnable": 0}
    first = ""
    rows = sources.read_located(data.source, data.split, data.limit, "config.data.source")
    with work(f"tokenising {data.source}", len(rows), "rows") as tokenising:
        for row, where in rows:
            tokenising.add()
            if "messages" not in row:
                raise UserError(f'{where}: no "messages" to learn from; give a conversation in every row')
            answer = "" if row["messages"][-1]["role"] == "assistant" else templates.fill(config.answer, row, where)
            with sources.naming(where):
                try:
                    pair = answers.answer_ids(reader, row, answer, data.template)
                except Unlearnable as error:
                    counts["unlearnable"] += 1
                    first = first or f"{where}: {error}"
                    continue
            if sum(map(len, pair)) <= config.max_tokens:
                pairs.append(pair)
            else:
                counts["dropped"] += 1
    counts["kept"] = len(pairs)
    warnings = [f"{counts['unlearnable']} rows are left out, the first is {first}"] if first else []
    if not pairs:
        if counts["dropped"]:
            warnings.append(f"none of its rows fits config.max_tokens = {config.max_tokens}; raise it")
        raise UserError(f"config.data.source: {'; '.join(warnings)}")
    return pairs, counts, warnings
