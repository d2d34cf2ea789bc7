"""Every form of file gives the same rows, whatever characters are in them, and names the line of a mistake."""

import csv
import json
import unicodedata

import pyarrow
import pyarrow.parquet
import pytest

from camopd_jax.data import files
from camopd_jax.data.sources import read
from camopd_jax.errors import UserError

# All that Python's str.splitlines, text mode or a terminal take for the end of a line, and other awkward characters
ODD = [c for c in map(chr, range(0x3000)) if len(f"a{c}b".splitlines()) > 1 or unicodedata.category(c) in ("Cc", "Cf")]
ROWS = [{"prompt": f"{c}name a{c}b", "answer": f"x{c}"} for c in [*ODD, "\r\n", "\U0001f600", '","', "'", "\ufeff"]]


def json_lines(path, rows):
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def escaped_lines(path, rows):
    path.write_bytes("\r\n".join(map(json.dumps, rows)).encode())


def with_a_mark(path, rows):
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8-sig"))


def array(path, rows):
    path.write_bytes(("\n\n" + json.dumps(rows, ensure_ascii=False)).encode())


def indented_array(path, rows):
    path.write_bytes(json.dumps(rows, indent=2).encode("utf-8-sig"))


def table(path, rows):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    "write, name",
    [
        (json_lines, "rows.jsonl"),
        (escaped_lines, "rows.jsonl"),
        (with_a_mark, "rows.jsonl"),
        (json_lines, "rows.json"),
        (array, "rows.json"),
        (array, "rows.jsonl"),
        (indented_array, "rows.json"),
        (table, "rows.csv"),
        (parquet, "rows.parquet"),
    ],
)
def test_rows_of_any_text_are_read_from_every_form(tmp_path, write, name):
    assert len(ODD) > 60 and {"\u2028", "\x85", "\x1c", "\r"} <= set(ODD)
    write(tmp_path / name, ROWS)
    assert read(str(tmp_path / name)) == ROWS


def test_a_table_of_questions(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(
        'question,answer,choices\n"sort ""cab"", please",abc,"[\'abc\', \'bac\']"\n\n"two\nlines",x,\n,,\nlast,y,z\n'
    )
    rows = list(files.rows(path, "source"))
    assert rows == [
        ({"question": 'sort "cab", please', "answer": "abc", "choices": "['abc', 'bac']"}, f"{path}:2"),
        ({"question": "two\nlines", "answer": "x"}, f"{path}:4"),
        ({"question": "last", "answer": "y", "choices": "z"}, f"{path}:7"),
    ]
    contents = [row["messages"] for row in read(str(path))]
    assert contents[1] == [{"role": "user", "content": "two\nlines"}] and len(contents) == 3


def test_a_long_cell(tmp_path):
    (tmp_path / "x.csv").write_text(f"prompt\n{'a' * 200_000}\n")
    assert len(read(str(tmp_path / "x.csv"))[0]["prompt"]) == 200_000


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("x.csv", "prompt,answer\na,b\na,b,c\n", "x.csv:3: 3 cells, but 2 columns"),
        ("x.csv", "prompt,answer\na\n", "x.csv:2: 1 cells, but 2 columns"),
        ("x.csv", 'prompt\n"a\nb\n', "x.csv:3: not CSV (unexpected end of data)"),
        ("x.csv", 'prompt\n"a"b\n', "x.csv:2: not CSV"),
        ("x.csv", "prompt,prompt\na,b\n", "x.csv:1: two columns have the same name"),
        ("x.csv", "prompt\n", "x.csv: no rows"),
        ("x.csv", "", "x.csv: no rows"),
        ("x.csv", "question;answer\na;b\n", "x.csv:2: no prompt"),
        ("x.csv", b"prompt\na\n\xe9\n", "x.csv:3: not UTF-8"),
        ("x.json", "[]", "x.json: no rows"),
        ("x.json", '[{"prompt": "a"}, 7]', "x.json row 1: a row must be a JSON object, this is int"),
        ("x.json", '[{"prompt": "a"}, {"text": "a"}]', "x.json row 1: no prompt"),
        ("x.json", '[\n{"prompt": "a"},\n{"prompt" "a"}]', "x.json: not JSON (Expecting ':' delimiter: line 3"),
        ("x.json", '{\n "prompt": "a"\n}', "x.json:1: not JSON"),
        ("x.jsonl", '{"prompt": "a"}\r{"prompt": "b"}\n', "x.jsonl:1: not JSON (Extra data"),
        ("x.jsonl", b'{"prompt": "a"}\n\n{"prompt": "\xe9"}\n', "x.jsonl:3: not UTF-8"),
        ("x.jsonl", '{"prompt": "a"}'.encode("utf-16"), "x.jsonl:1: not UTF-8"),
        ("x.parquet", b"PAR1" + b"\0" * 20 + b"PAR1", "x.parquet: not a parquet file"),
    ],
)
def test_a_mistake_is_named_by_file_and_line(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read(str(tmp_path / name))
    assert str(error.value).startswith(f"{tmp_path / says}")
