"""Rows from files, and errors that name the line of a malformed row."""

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from camopd_jax.data.sources import read, read_jsonl
from camopd_jax.errors import UserError

GOOD = {"messages": [{"role": "user", "content": "hi"}], "answer": "A"}


def test_reads_all_kinds_of_prompts_and_keeps_other_fields(write):
    rows = [GOOD, {"prompt": "text", "n": 3}, {"prompt_ids": [1, 2], "response_ids": []}]
    assert read_jsonl(write([rows[0], "", rows[1], rows[2]])) == rows


def test_several_files_and_a_limit(write, tmp_path):
    both = write([GOOD, GOOD], "a.jsonl") + ", " + write([{"prompt": "b"}], "b.jsonl")
    assert read(both) == [GOOD, GOOD, {"prompt": "b"}]
    assert read(both, limit=1) == [GOOD]


def test_parquet_rows_without_the_nulls_of_other_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"prompt": "a", "answer": None}, {"prompt": "b", "answer": "B"}]), path
    )
    assert read(str(path)) == [{"prompt": "a"}, {"prompt": "b", "answer": "B"}]


def test_a_dataset_by_name(monkeypatch):
    made = datasets.Dataset.from_list([GOOD, GOOD, GOOD])
    calls = []

    def load_dataset(*name, split, streaming, **revision):
        calls.append((*name, split, streaming, revision))
        return made.to_iterable_dataset() if streaming else made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name", "test") == [GOOD] * 3
    assert read("owner/name:part@0a1b", "test", limit=2) == [GOOD] * 2
    assert calls == [
        ("owner/name", None, "test", False, {}),
        ("owner/name", "part", "test", True, {"revision": "0a1b"}),
    ]


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object, this is list"),
        ('{"messages": []}', '"messages" must be a list of at least one'),
        ('{"messages": [{"role": "user"}]}', 'needs a text "role" and a text "content"'),
        ('{"messages": [{"role": "user", "content": 3}]}', 'needs a text "role" and a text "content"'),
        ('{"text": "x"}', 'no prompt; give "messages", "prompt" or "prompt_ids"'),
        ('{"prompt": ""}', "no prompt"),
        ('{"prompt_ids": []}', "at least one token"),
        ('{"prompt_ids": ["a"]}', '"prompt_ids" must be a list of token ids'),
        ('{"prompt": "a", "response_ids": [-1]}', '"response_ids" must be a list of token ids'),
        ('{"prompt": "a", "response": 3}', '"response" must be text'),
    ],
)
def test_the_error_for_a_malformed_row_names_file_and_line(write, row, message):
    path = write([GOOD, "", row])
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)


def test_missing_and_empty_files(tmp_path, write):
    with pytest.raises(UserError, match=r"config\.branches\.recovery\.prompts\.source: no file .*none\.jsonl"):
        read(str(tmp_path / "none.jsonl"), field="config.branches.recovery.prompts.source")
    with pytest.raises(UserError, match="no rows"):
        read(write([""]))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        read(str(tmp_path / "latin.jsonl"))
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(UserError, match="not a parquet file"):
        read(str(tmp_path / "bad.parquet"))


def test_a_dataset_that_the_hub_does_not_have():
    with pytest.raises(UserError, match=r"config\.branches\.review\.prompts\.source: no dataset 'no/such'"):
        read("no/such", field="config.branches.review.prompts.source")
