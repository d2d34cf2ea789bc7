"""Streams of batches, by grain: shuffled anew each epoch, the same on any number of processes.

Every process walks the same global order of batches and makes only its own rows of each, so that a
stream's position is one number that any number of processes can take up again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from camopd_jax.config.schema import RolloutConfig, SftConfig, Stream
from camopd_jax.data import sources, templates
from camopd_jax.errors import UserError
from camopd_jax.runtime.buckets import bucket
from camopd_jax.types import PromptBatch, Prompts, Sequences


def pad(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """int32[len(rows), width], right-padded with 0."""
    padded = np.zeros((len(rows), width), np.int32)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = row
    return padded


class BatchStream:
    """Endless batches of `make(rows of the global batch)`; its position can be saved and restored."""

    def __init__(self, rows: int, batch_size: int, seed: int, make: Callable[[np.ndarray], Any]):
        order = grain.MapDataset.range(rows).seed(seed).shuffle().repeat(None)
        batches = order.batch(batch_size).map(lambda numbers: make(np.asarray(numbers)))
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Any:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, as plain JSON values."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)


class PromptStream(BatchStream):
    """`PromptBatch`es of a stream of prompts, with this process's rows.

    `counts` tells what was kept, `lengths` how many tokens the student reads of each.
    """

    def __init__(
        self,
        stream: Stream,
        rollout: RolloutConfig,
        student: Any,
        teacher: Any,
        seed: int,
        mine: Sequence[int],
        field: str,
    ):
        """Reads and tokenises every prompt.

        Args:
          student, teacher: their tokenizers.
          mine: the numbers of this process's rows of a batch.
          field: how errors name the stream.

        Raises:
          UserError: for malformed rows, and if no prompt fits the cap.
        """
        cap = rollout.max_prompt_tokens
        self.counts = {"kept": 0, "dropped": 0, "truncated": 0}
        teacher_template = stream.teacher_template or stream.template
        same = student.chat_template == teacher.chat_template and teacher_template == stream.template
        prompts: list[tuple[int, list[int], list[int]]] = []
        for index, row in enumerate(sources.read(stream.source, stream.split, stream.limit, f"{field}.source")):
            ours = templates.prompt_ids(student, row, stream.template)
            theirs = ours if same else templates.prompt_ids(teacher, row, teacher_template)
            if max(len(ours), len(theirs)) > cap:
                if stream.too_long == "drop":
                    self.counts["dropped"] += 1
                    continue
                self.counts["truncated"] += 1
            prompts.append((index, ours[-cap:], theirs[-cap:]))
        self.counts["kept"] = len(prompts)
        self.lengths = np.asarray([len(ours) for _, ours, _ in prompts])
        if not prompts:
            raise UserError(
                f"{field}.source: none of its prompts fits config.rollout.max_prompt_tokens = {cap}; raise it, "
                f'or set {field}.too_long to "truncate"'
            )

        def make(numbers: np.ndarray) -> PromptBatch:
            batch = [prompts[i] for i in numbers]

            def side(k: int) -> Prompts:
                width = min(cap, bucket(max(len(prompt[k]) for prompt in batch), rollout.smallest_bucket))
                own = [batch[i][k] for i in mine]
                return Prompts(pad(own, width), np.asarray([len(ids) for ids in own], np.int32))

            return PromptBatch(side(1), side(2), np.asarray([batch[i][0] for i in mine], np.int32))

        super().__init__(len(prompts), rollout.batch_size, seed, make)


class SftStream(BatchStream):
    """`SftBatch`es of conversations to learn from, with this process's rows."""

    def __init__(self, config: SftConfig, tokenizer: Any, mine: Sequence[int]):
        data = config.data
        self.counts = {"kept": 0, "dropped": 0}
        pairs: list[tuple[list[int], list[int]]] = []
        for number, row in enumerate(sources.read(data.source, data.split, data.limit, "config.data.source"), 1):
            where = f"{data.source} row {number}"
            if "messages" not in row:
                raise UserError(f'{where}: no "messages" to learn from')
            answer = "" if row["messages"][-1]["role"] == "assistant" else templates.fill(config.answer, row, where)
            pair = templates.answer_ids(tokenizer, row, answer, data.template)
            if len(pair[0]) + len(pair[1]) > config.max_tokens:
                self.counts["dropped"] += 1
                continue
            pairs.append(pair)
        self.counts["kept"] = len(pairs)
        if not pairs:
            raise UserError(
                f"config.data.source: none of its rows fits config.max_tokens = {config.max_tokens}; raise it"
            )

        def make(numbers: np.ndarray) -> Sequences:
            batch = [pairs[i] for i in numbers]

            def side(k: int) -> Prompts:
                width = bucket(max(len(pair[k]) for pair in batch), config.smallest_bucket)
                own = [batch[i][k] for i in mine]
                return Prompts(pad(own, width), np.asarray([len(ids) for ids in own], np.int32))

            prompts, answers = side(0), side(1)
            return Sequences(prompts, answers.tokens, answers.lengths)

        super().__init__(len(pairs), config.batch_size, config.seed, make)
