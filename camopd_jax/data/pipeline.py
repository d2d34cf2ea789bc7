"""Streams of batches, by grain: shuffled anew each epoch, the same on any number of processes.

Every process walks the same global order of batches and makes only its own rows of each, so that a stream's position
is one number that any number of processes can continue from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grain
import numpy as np

from camopd_jax.config.schema import RolloutConfig, SftConfig, Stream
from camopd_jax.data import sources, templates
from camopd_jax.data.templates import Tokenizer, Tokenizers
from camopd_jax.errors import UserError
from camopd_jax.runtime.buckets import bucket
from camopd_jax.types import PromptBatch, Prompts, Sequences

Batch = TypeVar("Batch")


def pad(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """int32[len(rows), width], right-padded with 0."""
    padded = np.zeros((len(rows), width), np.int32)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = row
    return padded


def pad_prompts(rows: Sequence[Sequence[int]], width: int) -> Prompts:
    """Token lists as right-padded host arrays of this width in tokens."""
    lengths = np.asarray([len(row) for row in rows], np.int32)
    return Prompts(pad(rows, width), lengths)  # type: ignore[arg-type]  # host arrays: `global_rows` puts them on a mesh


class BatchStream(Generic[Batch]):
    """An endless iterator of batches, whose position can be saved and restored."""

    def __init__(self, rows: int, batch_size: int, seed: int, make: Callable[[np.ndarray], Batch]):
        """Shuffles `rows` row numbers by `seed` in every epoch.

        Args:
          make: a batch from int[batch_size], the row numbers of the global batch.
        """
        order = grain.MapDataset.range(rows).seed(seed).shuffle().repeat(None)
        batches = order.batch(batch_size).map(lambda numbers: make(np.asarray(numbers)))
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def __iter__(self) -> "BatchStream[Batch]":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, as plain JSON values."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position that `get_state` gave."""
        self._iterator.set_state(state)


# ---------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class TokenisedPrompt:
    """A prompt as both models read it."""

    index: int  # its row in the source
    student: list[int]
    teacher: list[int]


class PromptStream(BatchStream[PromptBatch]):
    """`PromptBatch`es of a stream of prompts, with this process's rows.

    `counts` says how many prompts were kept, dropped and truncated; `lengths`, int[kept], how many tokens the student
    reads of each.
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
          rollout: its `batch_size`, `max_prompt_tokens` and `smallest_bucket` are read.
          seed: of the order of the prompts.
          own_rows: numbers of the rows of a global batch that this process makes.
          field: the config field of the stream, for error messages.

        Raises:
          UserError: for malformed rows, and if no prompt fits the cap.
        """
        cap = rollout.max_prompt_tokens
        prompts, self.counts = tokenise(stream, tokenizers, cap, field)
        self.lengths = np.asarray([len(prompt.student) for prompt in prompts])

        def make(numbers: np.ndarray) -> PromptBatch:
            batch = [prompts[i] for i in numbers]
            own = [batch[i] for i in own_rows]

            def padded(side: str) -> Prompts:
                longest = max(len(getattr(prompt, side)) for prompt in batch)  # of the global batch: one width for all
                width = min(cap, bucket(longest, rollout.smallest_bucket))
                return pad_prompts([getattr(prompt, side) for prompt in own], width)

            index = np.asarray([prompt.index for prompt in own], np.int32)
            return PromptBatch(padded("student"), padded("teacher"), index)  # type: ignore[arg-type]  # a host array

        super().__init__(len(prompts), rollout.batch_size, seed, make)


def tokenise(
    stream: Stream, tokenizers: Tokenizers, cap: int, field: str
) -> tuple[list[TokenisedPrompt], dict[str, int]]:
    """The prompts of a stream, and how many were "kept", "dropped" and "truncated".

    Args:
      cap: the longest prompt in tokens, as either model reads it.
      field: the config field of the stream, for error messages.

    Raises:
      UserError: for malformed rows, and if no prompt fits the cap.
    """
    student, teacher = tokenizers.student, tokenizers.teacher
    teacher_template = stream.teacher_template or stream.template
    same = student.chat_template == teacher.chat_template and teacher_template == stream.template
    counts = {"kept": 0, "dropped": 0, "truncated": 0}
    prompts = []
    rows = sources.read_located(stream.source, stream.split, stream.limit, f"{field}.source")
    for index, (row, where) in enumerate(rows):
        with sources.naming(where):
            of_student = templates.prompt_ids(student, row, stream.template)
            of_teacher = of_student if same else templates.prompt_ids(teacher, row, teacher_template)
        too_long = max(len(of_student), len(of_teacher)) > cap
        if too_long and stream.too_long == "drop":
            counts["dropped"] += 1
            continue
        counts["truncated"] += too_long
        prompts.append(TokenisedPrompt(index, of_student[-cap:], of_teacher[-cap:]))
    counts["kept"] = len(prompts)
    if not prompts:
        raise UserError(
            f"{field}.source: none of its prompts fits config.rollout.max_prompt_tokens = {cap}; raise it, "
            f'or set {field}.too_long to "truncate"'
        )
    return prompts, counts


# ---------------------------------------------------------------------------------- conversations


class SftStream(BatchStream[Sequences]):
    """`Sequences`es of conversations to learn from, with this process's rows.

    `counts` says how many conversations were kept and dropped.
    """

    def __init__(self, config: SftConfig, tokenizer: Tokenizer, own_rows: Sequence[int] | np.ndarray):
        """Reads and tokenises every conversation.

        Args:
          own_rows: numbers of the rows of a global batch that this process makes.

        Raises:
          UserError: for malformed rows, and if no conversation fits the cap.
        """
        pairs, self.counts = _conversations(config, tokenizer)

        def make(numbers: np.ndarray) -> Sequences:
            batch = [pairs[i] for i in numbers]

            def padded(side: int) -> Prompts:
                width = bucket(max(len(pair[side]) for pair in batch), config.smallest_bucket)
                return pad_prompts([batch[i][side] for i in own_rows], width)

            prompts, answers = padded(0), padded(1)
            return Sequences(prompts, answers.tokens, answers.lengths)

        super().__init__(len(pairs), config.batch_size, config.seed, make)


def _conversations(config: SftConfig, tokenizer: Tokenizer) -> tuple[list[tuple[list[int], list[int]]], dict[str, int]]:
    """The token ids of each prompt and its answer, and how many conversations were "kept" and "dropped"."""
    data = config.data
    pairs = []
    rows = sources.read_located(data.source, data.split, data.limit, "config.data.source")
    for row, where in rows:
        if "messages" not in row:
            raise UserError(f'{where}: no "messages" to learn from; give a conversation in every row')
        answer = "" if row["messages"][-1]["role"] == "assistant" else templates.fill(config.answer, row, where)
        with sources.naming(where):
            prompt_ids, answer_ids = templates.answer_ids(tokenizer, row, answer, data.template)
        if len(prompt_ids) + len(answer_ids) <= config.max_tokens:
            pairs.append((prompt_ids, answer_ids))
    if not pairs:
        raise UserError(f"config.data.source: none of its rows fits config.max_tokens = {config.max_tokens}; raise it")
    return pairs, {"kept": len(pairs), "dropped": len(rows) - len(pairs)}
