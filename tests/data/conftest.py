"""The quickstart's tokenizer, and files of rows."""

import json

import pytest
from quickstart import QUICKSTART

from camopd_jax.data import templates


@pytest.fixture(scope="session")
def folder():
    return QUICKSTART / "generalist"


@pytest.fixture(scope="session")
def tokenizer(folder):
    return templates.load_tokenizer(folder)


@pytest.fixture
def write(tmp_path):
    """write(rows) -> the path of a JSONL file; a row that is a string is written unchanged."""

    def to(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return str(path)

    return to
