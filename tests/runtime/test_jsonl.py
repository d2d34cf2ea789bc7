"""Files of JSON lines: whatever text a row holds comes back, and a cut never costs more than the row it is in."""

import json
import math
import unicodedata
from datetime import date

import pytest
from etils import epath

from camopd_jax.evals.answer_file import AnswerFile
from camopd_jax.evals.task import Grade
from camopd_jax.runtime.jsonl import append_rows, drop_rows_after, read_rows, write_rows
from camopd_jax.runtime.progress import Work

# All that Python's str.splitlines, text mode or a terminal take for the end of a line, and other awkward characters
ODD = [c for c in map(chr, range(0x3000)) if len(f"a{c}b".splitlines()) > 1 or unicodedata.category(c) in ("Cc", "Cf")]
ODD += ["\r\n", "\ufeff", "\U0001f600", "\ufffe", '"\\', "\\n", "\\u2028"]
TEXTS = [f"{c}name a{c}b{c}" for c in ODD] + ["".join(ODD)]


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "rows.jsonl"


def test_the_odd_characters_are_there():
    assert {"\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\0"} <= set(ODD)


def test_rows_of_any_text_come_back_from_every_writer(path):
    rows = [{"step": i, text: [text, {"text": text}]} for i, text in enumerate(TEXTS)]
    write_rows(path, rows)
    assert read_rows(path) == rows
    append_rows(path, rows[:5])
    append_rows(path, rows[5:])
    assert read_rows(path) == rows * 2
    write_rows(path, rows)
    drop_rows_after(path, len(rows) - 2)
    assert read_rows(path) == rows[:-2]
    assert path.read_bytes().count(b"\n") == len(rows) - 2, "a line for each row, whatever it holds"


def test_answers_of_any_text_are_made_once(path):
    def compute(missing, save):
        asked.append(missing)
        save({i: {"response": TEXTS[i], "length": 1, "stopped": True} for i in missing})

    for expected in ([list(range(len(TEXTS)))], []):
        asked = []
        keys = [f"key{i}" for i in range(len(TEXTS))]
        answers = AnswerFile(path).complete(keys, compute, Work("answering"))
        assert [row["response"] for row in answers] == TEXTS and asked == expected


def test_a_damaged_answer_is_computed_again(path):
    def compute(missing, save):
        computed.append(missing)
        save({i: {"response": f"answer {i}", "length": 2, "stopped": True} for i in missing})

    def complete():
        return AnswerFile(path).complete(["a", "b", "c"], compute, Work("answering"))

    computed = []
    answers = complete()
    AnswerFile(path).save_grades(answers, [Grade(0.5, parts={"loose": (math.nan, 2)})] * 3, "exact")
    graded = read_rows(path)
    assert complete() == graded and computed == [[0, 1, 2]]
    whole = path.read_bytes()
    for before, after in ((b"answer 1", b"answes 1"), (b'"score": 0.5', b'"score": 0.7'), (b'"digest"', b'"digesu"')):
        computed.clear()
        path.write_bytes(whole.replace(before, after, 1))
        complete()
        assert computed == [[1 if before == b"answer 1" else 0]]
        assert {row["response"] for row in read_rows(path)} == {"answer 0", "answer 1", "answer 2"}


def test_a_file_cut_at_any_byte_loses_the_row_of_the_cut_alone(path):
    rows = [{"step": 0, "text": "é\u2028"}, {"step": 1, "text": "\U0001f600"}]
    write_rows(path, rows)
    whole = path.read_bytes()
    ends = [whole.index(b"\n"), len(whole) - 1]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert read_rows(path) == rows[: sum(cut >= end for end in ends)], whole[:cut]


@pytest.mark.parametrize("write", [write_rows, append_rows])
def test_no_value_stops_a_row_from_being_written(path, write):
    row = {
        "half": "\ud83d smile", "\udc00": 1, "when": date(2024, 5, 1), "raw": b"x", "pair": (1, math.inf),
        "numbers": [math.nan, {"least": -math.inf}, 1e308],
    }  # fmt: skip
    write(path, [row])
    strict = json.loads(path.read_bytes().decode(), parse_constant=pytest.fail)
    assert strict == {
        "half": "\ud83d smile", "\udc00": 1, "when": "2024-05-01", "raw": "b'x'", "pair": [1, None],
        "numbers": [None, {"least": None}, 1e308],
    }  # fmt: skip
