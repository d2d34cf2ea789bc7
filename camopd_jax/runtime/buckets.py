"""Lengths rounded up to few widths, rows of like length together: little padding and few compiled programs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


def bucket(length: int, smallest: int) -> int:
    """The least `smallest * 2**k` that holds `length`."""
    width = smallest
    while width < length:
        width *= 2
    return width


def fine_bucket(length: int, smallest: int) -> int:
    """The least of `smallest` times 1, 2, 3, 4, 6, 8, 12, ... that holds `length`: at most a third is padding.

    >>> [fine_bucket(n, 64) for n in (1, 65, 129, 193, 257, 385)]
    [64, 128, 192, 256, 384, 512]
    """
    width = bucket(length, smallest)
    lower = width * 3 // 4
    return lower if width >= 4 * smallest and lower >= length else width


@dataclass(frozen=True)
class Widths:
    """Static sizes of a program that scores or learns."""

    slots: int  # that hold the longest row, prompt and answer
    answer_slots: int  # that hold the longest answer
    chunk: int  # tokens of a chip whose logits may exist at one time; 0: `head.tokens_at_once`


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a batch that go through a program at one time."""

    rows: np.ndarray  # int32[M]; one beyond the batch's last stands for no row
    slots: int  # that hold the longest row, prompt and answer
    answer_slots: int  # that hold the longest answer

    def widths(self, chunk: int) -> Widths:
        return Widths(self.slots, self.answer_slots, chunk)


def split_by_length(
    prompt_lengths: np.ndarray,
    lengths: np.ndarray,
    rows: np.ndarray,
    size: int,
    widths: tuple[int, int],
    smallest: int,
    shards: int = 1,
) -> Iterator[MicroBatch]:
    """The rows by falling length, `size` at a time; the last few, where they fill no half of that, by quarters.

    Args:
      prompt_lengths, lengths: int[B], of the whole batch's prompts and answers.
      rows: which of them to take.
      widths: prompt and answer slots of the batch: no piece is wider.
      smallest: the least width.
      shards: what the rows of a piece have to divide by.
    """
    total = prompt_lengths + lengths
    order = rows[np.argsort(-total[rows], kind="stable")]
    quarter = size // 4 if size % (4 * shards) == 0 else size
    start = 0
    while start < len(order):
        take = quarter if len(order) - start <= size // 2 else size
        some = order[start : start + take]
        start += take
        answer_slots = min(widths[1], bucket(int(lengths[some].max()), smallest))
        slots = min(sum(widths), fine_bucket(int(total[some].max()), smallest))
        padded = np.pad(some, (0, take - len(some)), constant_values=len(lengths)).astype(np.int32)
        yield MicroBatch(padded, max(slots, answer_slots), answer_slots)


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """Row numbers in batches of one size and of like lengths, shortest first; the last repeats its last row.

    >>> [rows.tolist() for rows in length_batches([30, 10, 20], 2)]
    [[1, 2], [0, 0]]
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield np.pad(rows, (0, batch_size - len(rows)), mode="edge")
