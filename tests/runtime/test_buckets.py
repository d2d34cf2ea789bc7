"""Bucket widths and micro-batches, by hand."""

import numpy as np

from camopd_jax.runtime.buckets import split_by_length


def cut(prompt_lengths, lengths, rows, size, **options):
    widths = 16, 64
    made = split_by_length(np.array(prompt_lengths), np.array(lengths), np.array(rows), size, widths, 4, **options)
    return [(p.rows.tolist(), p.slots, p.answer_slots) for p in made]


def test_micro_batches_have_similar_lengths_and_minimal_widths():
    assert cut([2, 9, 3, 1], [3, 50, 2, 20], range(4), 2) == [([1, 3], 64, 64), ([0, 2], 8, 4)]
    assert cut([16], [64], [0], 1) == [([0], 80, 64)], "no wider than the batch"


def test_the_last_rows_form_quarter_micro_batches():
    lengths = list(range(13, 0, -1))
    sizes = [len(rows) for rows, _, _ in cut([1] * 13, lengths, range(13), 4)]
    assert sizes == [4, 4, 4, 1]
    rows = [row for part, _, _ in cut([1] * 13, lengths, range(13), 8) for row in part]
    assert rows[:8] == list(range(8)) and len(rows) == 16, "five of eight fill more than half"
    assert rows[8:] == [8, 9, 10, 11, 12, 13, 13, 13], "13: nobody"
    assert [len(r) for r, _, _ in cut([1] * 13, lengths, range(13), 8, shards=4)] == [8, 8], "quarters would not divide"


def test_every_row_is_in_one_micro_batch():
    random = np.random.default_rng(0)
    for _ in range(200):
        n = int(random.integers(1, 40))
        prompt_lengths, lengths = random.integers(1, 17, n), random.integers(1, 65, n)
        rows = random.permutation(n)[: int(random.integers(1, n + 1))]
        made = list(split_by_length(prompt_lengths, lengths, rows, 8, (16, 64), 4))
        seen = [row for p in made for row in p.rows.tolist() if row < n]
        assert sorted(seen) == sorted(rows.tolist())
        for p in made:
            real = p.rows[p.rows < n]
            assert (prompt_lengths + lengths)[real].max() <= p.slots and lengths[real].max() <= p.answer_slots
