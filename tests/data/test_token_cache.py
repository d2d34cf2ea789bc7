"""Tokenised prompts that are kept between starts."""

from dataclasses import replace
from datetime import datetime

import pytest
from quickstart import QUICKSTART
from rows import chat_row, write_lines

from camopd_jax.config.schema import Stream, Template
from camopd_jax.data import dates, pipeline, templates, token_cache
from camopd_jax.data.templates import Reader, Tokenizers

GENERALIST = QUICKSTART / "generalist"


@pytest.fixture
def tokenizers():
    reader = Reader(templates.load_tokenizer(GENERALIST), 52)
    return Tokenizers(reader, reader)


@pytest.fixture
def stream(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "SECONDS", 0)
    write_lines(tmp_path / "a.jsonl", [chat_row("sort gfa"), chat_row("a" * 60), chat_row("add 1+2")])
    return Stream(str(tmp_path / "a.jsonl"))


def entries(tmp_path):
    return sorted((tmp_path / "cache" / "camopd_jax" / "prompts").glob("*"))


@pytest.mark.parametrize("teacher", [None, Template(system="add")])
def test_what_was_tokenised_is_read_again(stream, tokenizers, teacher, tmp_path, monkeypatch):
    stream = replace(stream, teacher_template=teacher)
    first = pipeline.tokenise(stream, tokenizers, 24, "prompts")
    assert [prompt.index for prompt in first[0]] == [0, 2] and first[1] == {"kept": 2, "dropped": 1, "truncated": 0}
    assert all((prompt.teacher == prompt.student) == (teacher is None) for prompt in first[0])
    (file,) = entries(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_tokenise", None)
        assert pipeline.tokenise(stream, tokenizers, 24, "prompts") == first
    for damaged in (b"", file.read_bytes()[:-40], b"no zip"):
        file.write_bytes(damaged)
        assert pipeline.tokenise(stream, tokenizers, 24, "prompts") == first
        assert entries(tmp_path) == [file] and file.read_bytes() != damaged


def test_a_key_depends_on_everything_that_tokens_depend_on(stream, tokenizers, tmp_path, monkeypatch):
    def key(**fields):
        return token_cache.key(replace(stream, **fields), tokenizers, 24)

    keys = {key(), key(limit=2), key(too_long="truncate"), key(template=Template(system="a")),
            key(teacher_template=Template(system="a")), token_cache.key(stream, tokenizers, 25)}  # fmt: skip
    larger = Tokenizers(tokenizers.student, replace(tokenizers.teacher, vocab_size=60))
    keys.add(token_cache.key(stream, larger, 24))
    monkeypatch.setattr(tokenizers.student.tokenizer, "chat_template", "{{ messages }}{{ strftime_now('%d') }}")
    for day in (1, 2):
        monkeypatch.setattr(dates, "_fixed", datetime(2026, 1, day))
        keys |= {key(), key()}
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + "\n")
    keys.add(key())
    assert len(keys) == 10 and None not in keys
    assert key(source="openai/gsm8k") is None


def test_only_the_files_used_last_are_kept(stream, tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "KEPT", 2)
    for cap in (24, 25, 26):
        pipeline.tokenise(stream, tokenizers, cap, "prompts")
    assert {file.stem for file in entries(tmp_path)} == {token_cache.key(stream, tokenizers, cap) for cap in (25, 26)}


def test_a_cache_that_cannot_be_written_is_no_error(stream, tokenizers, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert len(pipeline.tokenise(stream, tokenizers, 24, "prompts")[0]) == 2
