"""Streams: every prompt once per epoch, positions that can be restored, and the rows of each process."""

import dataclasses
import itertools
import json
import re
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from rows import add_tokens, chat_row

from camopd_jax.config.schema import RolloutConfig, SftConfig, Stream, Template
from camopd_jax.data import templates
from camopd_jax.data.pipeline import (
    AnsweredPrompt,
    AnsweredStream,
    BatchStream,
    PromptStream,
    SftStream,
    TokenisedPrompt,
    pad,
)
from camopd_jax.data.prompt_map import Group, PromptMap
from camopd_jax.data.templates import Reader, Tokenizers
from camopd_jax.errors import UserError
from camopd_jax.runtime.buckets import bucket, length_batches

ROLLOUT = RolloutConfig(batch_size=4, max_prompt_tokens=16, smallest_bucket=8)


def stream(tokenizer, source, mine=range(4), seed=0, rollout=ROLLOUT, **fields):
    return PromptStream(
        Stream(source, **fields),
        rollout,
        Tokenizers(*[Reader(tokenizer, 52)] * 2),
        seed,
        mine,
        "config.general",
    )


def words(count):
    return [chat_row("ab" * (1 + i % 3)) for i in range(count)]


def indices(batches):
    return [batch.index.tolist() for batch in batches]


def test_buckets_are_powers_of_two():
    assert [bucket(n, 16) for n in (1, 16, 17, 100)] == [16, 16, 32, 128]


def test_pad_fills_with_zero_to_the_right():
    np.testing.assert_array_equal(pad([[1, 2], [3]], 3), [[1, 2, 0], [3, 0, 0]])


def test_length_batches_have_every_row():
    batches = list(length_batches([5, 1, 4, 2, 3], 2))
    assert [b.tolist() for b in batches] == [[1, 3], [4, 2], [0, 0]]


def test_each_epoch_has_every_prompt_once_in_a_new_order(tokenizer, write):
    batches = list(itertools.islice(stream(tokenizer, write(words(8))), 6))
    epochs = [[*itertools.chain(*indices(batches[i : i + 2]))] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(8))


def test_the_seed_determines_the_order(tokenizer, write):
    path = write(words(40))
    first = [indices(itertools.islice(stream(tokenizer, path, seed=s), 5)) for s in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


def test_several_answers_repeat_each_prompt_of_the_same_order(tokenizer, write):
    """A batch has the prompts of a run with one answer, each in consecutive rows; also those of another process."""
    source = write(words(11))
    once = stream(tokenizer, source)
    several = dataclasses.replace(ROLLOUT, answers_per_prompt=3)
    thrice, second = stream(tokenizer, source, range(12), rollout=several), stream(tokenizer, source, range(6, 12),
                                                                                  rollout=several)  # fmt: skip
    for _ in range(3):
        one, three, part = next(once), next(thrice), next(second)
        np.testing.assert_array_equal(three.index, np.repeat(one.index, 3))
        np.testing.assert_array_equal(three.student.tokens, np.repeat(one.student.tokens, 3, axis=0))
        np.testing.assert_array_equal(part.index, three.index[6:])


def test_a_stream_resumes_in_the_middle_of_an_epoch(tokenizer, write):
    path = write(words(10))
    whole = stream(tokenizer, path)
    list(itertools.islice(whole, 3))
    position = whole.get_state()
    rest = indices(itertools.islice(whole, 5))
    again = stream(tokenizer, path)
    again.set_state(position)
    assert indices(itertools.islice(again, 5)) == rest


def test_each_process_has_its_rows_of_the_global_batch(tokenizer, write):
    path = write(words(10))
    whole, left, right = (stream(tokenizer, path, mine=m) for m in (range(4), (0, 3), (1, 2)))
    for a, b, c in itertools.islice(zip(whole, left, right, strict=True), 4):
        assert b.student.tokens.shape == (2, a.student.tokens.shape[1])
        order = [0, 3, 1, 2]
        np.testing.assert_array_equal(np.concatenate([b.student.tokens, c.student.tokens]), a.student.tokens[order])
        np.testing.assert_array_equal(np.concatenate([b.index, c.index]), a.index[order])


def test_index_matches_the_rows_of_a_batch(tokenizer, write):
    rows = words(9)
    batch = next(stream(tokenizer, write(rows)))
    for tokens, length, index in zip(batch.student.tokens, batch.student.lengths, batch.index, strict=True):
        assert (
            tokenizer.decode(tokens[:length]) == f"<|user|>{rows[index]['messages'][0]['content']}<|end|><|assistant|>"
        )
        assert not tokens[length:].any()
    assert batch.student.tokens.shape[1] in (8, 16)


def test_long_prompts_are_dropped_or_cut_at_the_start(tokenizer, write):
    path = write([chat_row("a"), chat_row("b" * 30), chat_row("c")])
    dropped = stream(tokenizer, path)
    assert dropped.counts == {"kept": 2, "dropped": 1, "truncated": 0}
    assert {i for batch in itertools.islice(dropped, 4) for i in batch.index.tolist()} == {0, 2}
    cut = stream(tokenizer, path, too_long="truncate")
    assert cut.counts == {"kept": 3, "dropped": 0, "truncated": 1}
    batch = next(b for b in cut if 1 in b.index.tolist())
    row = batch.index.tolist().index(1)
    assert tokenizer.decode(batch.student.tokens[row]) == "b" * 14 + "<|end|><|assistant|>"


def test_all_prompts_too_long(tokenizer, write):
    with pytest.raises(UserError, match=r"config\.general\.source: none .*max_prompt_tokens = 16"):
        stream(tokenizer, write([chat_row("b" * 30)]))


def test_the_teacher_may_have_another_system_prompt(tokenizer, write):
    rollout = dataclasses.replace(ROLLOUT, max_prompt_tokens=64)
    made = stream(
        tokenizer,
        write([chat_row("a")] * 4),
        rollout=rollout,
        template=Template(system="s"),
        teacher_template=Template(system="teach"),
    )
    batch = next(made)
    text = [tokenizer.decode(side.tokens[0, : side.lengths[0]]) for side in (batch.student, batch.teacher)]
    assert text == [f"<|system|>{s}<|end|><|user|>a<|end|><|assistant|>" for s in ("s", "teach")]


# ------------------------------------------------------------------------------------------- sft


def sft_stream(tokenizer, source, **fields):
    config = SftConfig("m", Stream(source), batch_size=2, max_tokens=16, smallest_bucket=8, **fields)
    return SftStream(config, Reader(tokenizer, 52), range(2))


def test_sft_trains_on_the_last_turn_or_the_answer_field(tokenizer, write):
    path = write([chat_row("a", "b"), chat_row("c") | {"answer": "d"}])
    batch = next(sft_stream(tokenizer, path, answer="x{answer}"))
    pairs = {
        (tokenizer.decode(p[:n]), tokenizer.decode(a[:m]))
        for p, n, a, m in zip(batch.prompts.tokens, batch.prompts.lengths, batch.tokens, batch.lengths, strict=True)
    }
    assert pairs == {("<|user|>a<|end|><|assistant|>", "b<|end|>"), ("<|user|>c<|end|><|assistant|>", "xd<|end|>")}


def test_sft_rows_that_cannot_be_learnt(tokenizer, write):
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the answer '\{answer\}' asks for the field 'answer'"):
        sft_stream(tokenizer, write([chat_row("a", "b"), chat_row("a")]))
    with pytest.raises(UserError, match=r'rows\.jsonl:1: no "messages"'):
        sft_stream(tokenizer, write([{"prompt": "a"}]))
    with pytest.raises(UserError, match=r"none of its rows fits config\.max_tokens = 16"):
        sft_stream(tokenizer, write([chat_row("a" * 20, "b")]))
    counts = sft_stream(tokenizer, write([chat_row("a" * 20, "b"), chat_row("a", "b")])).counts
    assert counts == {"kept": 1, "dropped": 1, "unlearnable": 0}


def test_sft_rows_that_do_not_continue_their_prompt_are_left_out_and_counted(tokenizer, write, monkeypatch):
    opens = "{% if add_generation_prompt %}<|assistant|><t>{% endif %}"
    strips = "<|{{ m.role }}|>{{ m.content.split('</t>')[-1] }}<|end|>"
    monkeypatch.setattr(tokenizer, "chat_template", f"{{% for m in messages %}}{strips}{{% endfor %}}{opens}")
    path = write([chat_row("a", "<t>b</t>c"), "", chat_row("a", "b"), chat_row("a", "c"), chat_row("a" * 20, "<t>b")])
    made = sft_stream(tokenizer, path)
    assert made.counts == {"kept": 1, "dropped": 1, "unlearnable": 2}
    assert made.warnings == [
        f"2 rows are left out, the first is {path}:3: the chat template opens every answer with '<t>', and this "
        "one does not begin with it"
    ]
    with pytest.raises(UserError, match=r"config\.data\.source: 1 rows are left out, the first is .*rows\.jsonl:1: "):
        sft_stream(tokenizer, write([chat_row("a", "b")]))


def test_a_token_beyond_the_embedding_is_named_where_it_is_used(tokenizer, write):
    """Id 51 is the last of the tokenizer; with an embedding of 51 rows, only rows that hold it are refused."""
    last = tokenizer.convert_ids_to_tokens(51)
    config = SftConfig(
        "m", Stream(write([chat_row("a", "b"), chat_row("a", f"b{last}")])), batch_size=2, smallest_bucket=8
    )
    error = rf"rows\.jsonl:2: token '{re.escape(last)}' \(id 51\) is beyond the 51 rows of the embedding of "
    with pytest.raises(UserError, match=error):
        SftStream(config, Reader(tokenizer, 51), range(2))
    assert SftStream(config, Reader(tokenizer, 52), range(2)).counts["kept"] == 2
    path = write([chat_row("a"), {"prompt_ids": [3, 51]}])
    for student, teacher in ((51, 52), (52, 51)):
        readers = Tokenizers(Reader(tokenizer, student), Reader(tokenizer, teacher))
        with pytest.raises(UserError, match=error):
            PromptStream(Stream(path), ROLLOUT, readers, 0, range(4), "config.general")


def test_a_teacher_with_fewer_tokens_reads_a_prompt_in_its_own(tokenizer, folder, write, tmp_path):
    """What is one token for the student, which has [PAD], is five for the teacher."""
    padded = shutil.copytree(folder, tmp_path / "padded")
    add_tokens(padded, "[PAD]")
    readers = Tokenizers(Reader(templates.load_tokenizer(padded), 53), Reader(tokenizer, 52))
    batch = next(
        PromptStream(Stream(write([{"prompt": "a[PAD]"}] * 4)), ROLLOUT, readers, 0, range(4), "config.general")
    )
    assert batch.student.tokens[0, : batch.student.lengths[0]].tolist() == [6, 52]
    assert batch.teacher.tokens[0, : batch.teacher.lengths[0]].tolist() == tokenizer("a[PAD]")["input_ids"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_a_row_that_the_template_refuses_is_named(tokenizer, write, monkeypatch, name):
    rows = [chat_row("a") | {"answer": "b"}, chat_row("a", "b", "c") | {"answer": "d"}]
    source, place = write([], name), {"rows.jsonl": "rows.jsonl:2"}.get(name, f"{name} row 1")
    if name == "rows.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    else:
        source = write(rows if name == "rows.jsonl" else [json.dumps(rows)], name)
    refusal = (
        "{% if messages[1:2] and messages[1]['role'] == 'assistant' and messages[2:] %}{{ raise_exception('no') }}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", refusal + "{% endif %}" + tokenizer.chat_template)
    for make in (stream, sft_stream):
        with pytest.raises(UserError, match=rf"{place}: .*the chat template refuses a conversation"):
            make(tokenizer, source)


def test_a_stream_of_anything():
    made = BatchStream(5, 3, 0, lambda numbers: numbers.sum())
    assert isinstance(made.get_state(), dict) and next(made) >= 3


def test_a_stream_of_one_row_at_a_time():
    """As of replay with 1 % of a batch of 64."""
    made = BatchStream(3, 1, 0, lambda numbers: numbers.tolist())
    assert [sorted(next(made)[0] for _ in range(3)) for _ in range(2)] == [[0, 1, 2]] * 2


def test_given_answers_come_with_their_prompts():
    """Two of the three rows of a batch belong to this process; the widths are those of the complete batch."""
    rows = [
        AnsweredPrompt(TokenisedPrompt(7 + i, [i + 1] * (i + 1), [9]), [i, 8] * (i + 1), 0.5 * i, i != 1)
        for i in range(3)
    ]
    rollout = RolloutConfig(batch_size=3, max_prompt_tokens=8, max_response_tokens=6, smallest_bucket=4)
    batch = next(AnsweredStream(rows, rollout, 0, [0, 2]))
    answers = batch.answers
    assert batch.student.tokens.shape == (2, 4) and answers.tokens.shape == answers.log_probs.shape == (2, 6)
    for i, index in enumerate(batch.index):
        row = rows[index - 7]
        assert batch.student.tokens[i, : batch.student.lengths[i]].tolist() == row.prompt.student
        assert answers.tokens[i].tolist()[: answers.lengths[i]] == row.ids and answers.lengths[i] == len(row.ids)
        assert (answers.entropy[i], answers.stopped[i]) == (row.entropy, row.stopped)
    other = AnsweredStream([*rows[:2], dataclasses.replace(rows[2], ids=[4])], rollout, 0, [0, 2])
    assert other.digest != AnsweredStream(rows, rollout, 0, [0]).digest


def test_a_weighted_stream_has_the_proportions_of_its_map_and_resumes(tokenizer, write):
    """56 prompts in three groups, draws 28 : 28 : 0. Each group serves all of its prompts before it repeats one."""
    path = write([chat_row(f"{'ab' * (i % 3)}{i}") for i in range(56)])
    plain, weighted = stream(tokenizer, path), stream(tokenizer, path)
    order = np.random.default_rng(0).permutation(np.repeat(range(3), (10, 40, 6)))
    groups = tuple(Group(str(i), n, 2, gap, 0.0, ("a",)) for i, (n, gap) in enumerate(((10, 2.0), (40, 0.5), (6, 0.0))))
    made = PromptMap("recovery", path, plain.digest, {}, groups, tuple(order.tolist()))
    weighted.weigh(made, "config.general.weights")
    assert weighted.digest != plain.digest
    batches = indices(itertools.islice(weighted, 20))
    served = list(itertools.chain(*batches))
    for end in range(1, len(served) + 1):
        counts = np.bincount(order[served[:end]], minlength=3)
        assert abs(counts[0] - end / 2) <= 1 and counts[2] == 0
    assert np.bincount(order[served[:56]], minlength=3).tolist() == [28, 28, 0]
    for group, size in ((0, 10), (1, 40)):
        of_group = [i for i in served if order[i] == group]
        assert len(of_group) == 40
        for start in range(0, 40, size):
            assert len(set(of_group[start : start + size])) == size
    again = stream(tokenizer, path)
    again.weigh(made, "config.general.weights")
    assert indices(itertools.islice(again, 7)) == batches[:7]
    state = json.loads(json.dumps(again.get_state()))
    resumed = stream(tokenizer, path)
    resumed.weigh(made, "config.general.weights")
    resumed.set_state(state)
    assert indices(itertools.islice(resumed, 13)) == batches[7:]
    with pytest.raises(UserError, match=re.escape("config.general.weights: the map was made for other prompts")):
        stream(tokenizer, path, limit=55).weigh(made, "config.general.weights")
