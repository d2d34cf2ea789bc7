"""Rounds lengths up to a few widths and groups rows of similar length, for little padding and few compiled programs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


def bucket(length: int, smallest: int) -> int:
    """The smallest `smallest * 2**k` that is at least `length`."""
    width = smallest
    while width < length:
        width *= 2
    return width


def fine_bucket(length: int, smallest: int) -> int:
    """The smallest of `smallest` times 1, 2, 3, 4, 6, 8, 12, ... that is at least `length`.

    >>> [fine_bucket(n, 64) for n in (1, 65, 129, 193, 257, 385)]
    [64, 128, 192, 256, 384, 512]
    """
    width = bucket(length, smallest)
    lower = width * 3 // 4
    return lower if width >= 4 * smallest and lower >= length else width


@dataclass(frozen=True)
class Widths:
    """Static sizes of a program that scores or computes gradients."""

    slots: int  # padded length of prompt and answer together
    answer_slots: int  # padded length of the answers
    chunk: int  # tokens per chip whose logits exist at a time; 0: `head.tokens_at_once`


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a batch that one call of a program computes."""

    rows: np.ndarray  # int32[M], row numbers; the batch's number of rows means: no row
    slots: int  # padded length of prompt and answer together
    answer_slots: int  # padded length of the answers

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
    """Splits rows, sorted by descending length, into micro-batches of `size`.

    Once at most half of `size` remains, micro-batches have a quarter of it if `shards` divides that.

    Args:
      prompt_lengths, lengths: int[B], of the prompts and answers of the complete batch.
      rows: the row numbers to use.
      widths: prompt and answer slots of the batch, which limit the widths.
      smallest: the smallest width.
      shards: must divide the number of rows of a micro-batch.
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
    """Batches of row numbers of similar lengths, shortest first; the last batch is filled by repeating its last row.

    >>> [rows.tolist() for rows in length_batches([30, 10, 20], 2)]
    [[1, 2], [0, 0]]
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield np.pad(rows, (0, batch_size - len(rows)), mode="edge")
