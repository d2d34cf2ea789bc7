"""Every form of file gives the same rows, whatever characters are in them, and names the line of a mistake."""

import bz2
import csv
import gzip
import json
import os
import unicodedata

import datasets
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


def tabs(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
        writer.writerows([["prompt", " answer "], *([row["prompt"], row["answer"]] for row in rows)])


def gzipped(path, rows):
    """In two members, as `cat a.gz b.gz` has them."""
    halves = [rows[:7], rows[7:]]
    texts = ["".join(json.dumps(row, ensure_ascii=False) + "\n" for row in half) for half in halves]
    path.write_bytes(b"".join(gzip.compress(text.encode()) for text in texts))


def bzipped_table(path, rows):
    table(path, rows)
    path.write_bytes(bz2.compress(path.read_bytes()))


def zstandard(path, rows):
    array(path, rows)
    path.write_bytes(pyarrow.compress(path.read_bytes(), codec="zstd", asbytes=True))


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
        (json_lines, "Rows.JSONL"),
        (json_lines, "rows.ndjson"),
        (json_lines, "prompts"),
        (tabs, "rows.tsv"),
        (gzipped, "rows.jsonl.gz"),
        (bzipped_table, "rows.csv.bz2"),
        (zstandard, "rows.json.zst"),
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
        ("x.csv", "prompt\ra\rb\r", "x.csv:1: not CSV (new-line character seen in unquoted field - do you need"),
        ("x.txt", "Why?\n", "x.txt:1: not JSON"),
        ("x.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 999, mtime=0)[:-20], "x.jsonl.gz: cannot be read"),
        ("x.jsonl.zst", b"{}", "x.jsonl.zst: cannot be read"),
        ("x.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "x.jsonl: a pointer of Git LFS"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\n", "x.parquet: a pointer of Git LFS"),
        ("x.parquet", b"PAR1" + b"\0" * 20 + b"PAR1", "x.parquet: not a parquet file"),
    ],
)
def test_a_mistake_is_named_by_file_and_line(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read(str(tmp_path / name))
    assert str(error.value).startswith(f"{tmp_path / says}")


def test_the_names_of_a_source(tmp_path, monkeypatch):
    """Files with a comma in their name, patterns, commas too many, and folders that `datasets` wrote."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "a,b.jsonl", "c[1].jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name}))
    texts = lambda source, **options: [row["prompt"] for row in read(source, **options)]  # noqa: E731
    assert texts("a,b.jsonl") == ["a,b.jsonl"]
    assert texts("b.jsonl, a.jsonl,") == ["b.jsonl", "a.jsonl"]
    assert texts("?.jsonl") == ["a.jsonl", "b.jsonl"]
    assert texts(f"{tmp_path}/[ab].jsonl,c[1].jsonl") == ["a.jsonl", "b.jsonl", "c[1].jsonl"]
    saved = datasets.Dataset.from_list([{"prompt": "x"}, {"prompt": "y"}])
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved.select([0]), test=saved.select([1])).save_to_disk(tmp_path / "two")
    assert texts("one") == texts(str(tmp_path / "one" / "data-00000-of-00001.arrow")) == ["x", "y"]
    assert texts("two") == ["x"] and texts("two", split="test", limit=1) == ["y"]


@pytest.mark.parametrize(
    "source, says",
    [
        ("https://huggingface.co/x.jsonl", "https://huggingface.co/x.jsonl is an address; copy the file"),
        ("hf://datasets/x/y", "hf://datasets/x/y is an address; give the name of a dataset (OWNER/NAME)"),
        ("./data/prompts", "no file or folder './data/prompts'"),
        ("/data/prompts", "no file or folder '/data/prompts'"),
        ("a b", "no file or folder 'a b'"),
        (",", "no file or folder ','"),
        ("*.jsonl", "no file *.jsonl"),
        ("~no.such.user/x.jsonl", "no file ~no.such.user/x.jsonl"),
        ("folder.jsonl", "folder.jsonl is a folder; give the files in it"),
        ("link.jsonl", "no file link.jsonl (a link to nowhere, which does not exist)"),
        ("pipe.jsonl", "pipe.jsonl is no regular file"),
    ],
)
def test_a_source_that_is_no_file(tmp_path, monkeypatch, source, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    if source == "*.jsonl":
        monkeypatch.chdir(tmp_path / "folder.jsonl")
    with pytest.raises(UserError) as error:
        read(source, field="--source")
    assert str(error.value).startswith(f"--source: {says}")
