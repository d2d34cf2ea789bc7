"""Prompts that a model writes itself: the open turn, the sampled texts, the filters and the files."""

import dataclasses
import hashlib
import json

import pytest
import torch
import transformers
from quickstart import QUICKSTART
from rows import chat_row, read_lines, write_lines

from camopd_jax.config.schema import Compute, Sampling
from camopd_jax.data import prompt_set, templates
from camopd_jax.errors import UserError
from camopd_jax.inference import loading
from camopd_jax.inference.answer import Answer
from camopd_jax.runs import self_prompts
from camopd_jax.runs.self_prompts import Filters, OpenTurn, SelfPrompting, cut, open_turn
from camopd_jax.runtime.mesh import make_mesh

GENERALIST = QUICKSTART / "generalist"
SETTINGS = SelfPrompting(str(GENERALIST), 3, 20, 3, Sampling(), None, 8, 0)
PLAIN = "{% for m in messages %}ask {{ m['content'] }} done{% endfor %}"


@pytest.fixture
def tokenizer():
    return templates.load_tokenizer(GENERALIST)


def test_the_open_turn_of_a_template(tokenizer):
    turn = open_turn(tokenizer, None)
    assert tokenizer.decode(turn.ids) == "<|user|>"
    assert turn.end == "<|end|>" == tokenizer.decode([turn.end_id])
    turn = open_turn(tokenizer, "be kind")
    assert tokenizer.decode(turn.ids) == "<|system|>be kind<|end|><|user|>"
    tokenizer.chat_template = PLAIN
    turn = open_turn(tokenizer, None)
    assert (tokenizer.decode(turn.ids), turn.end, turn.end_id) == ("ask ", "done", None)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="has no beginning of a user's turn"):
        open_turn(tokenizer, None)


def made(text, ids=None, stopped=True):
    return Answer(ids or list(range(len(text))), [], text, stopped, 0.0)


def test_letters_of_other_scripts():
    filters = Filters(dataclasses.replace(SETTINGS, scripts=("latin", "greek")))
    for text, reason in (
        ("What does \u03b1 mean, and \u4ec0?", None),  # 1 of 15 letters is Chinese
        ("What does \u4ec0\u4e48 mean?", "in another script"),  # 2 of 14
        ("12 + 3 = 15 ?", None),
    ):
        assert filters.reason(made(text), text) == reason


def test_prompts_are_spread_over_clusters(monkeypatch, tmp_path):
    """Six candidates, four sums before two reversals, for three prompts: two sums and a reversal, not three sums."""
    texts = ["add 12 + 34", "add 56 + 31", "add 21 + 63", "add 44 + 55", "reverse the word", "reverse my name", "x y z"]
    monkeypatch.setattr(self_prompts, "_texts", lambda *_: iter([(made(text), text) for text in texts]))
    settings = dataclasses.replace(SETTINGS, rows=3, clusters=2)
    manifest = self_prompts.build(settings, [], tmp_path)
    kept = [row["messages"][0]["content"] for row in read_lines(tmp_path / "prompts.jsonl")]
    assert kept == ["add 12 + 34", "add 56 + 31", "reverse the word"]
    (part,) = manifest["parts"]
    assert (part["asked"], part["kept"], part["read"]) == (3, 3, 6)
    assert part["dropped"] == {"beyond its cluster's share": 3} and manifest["clusters"] == 2


def test_text_after_the_end_of_a_turn_is_cut():
    turn = OpenTurn([1], "[/INST]", None)
    one, text = cut(made("What is it? [/INST] It is", stopped=False), turn)
    assert (text, one.stopped) == ("What is it?", True)
    one, text = cut(made(" What is", stopped=False), turn)
    assert (text, one.stopped) == ("What is", False)


def test_the_texts_are_what_the_model_writes_after_the_open_turn(tokenizer):
    """Almost greedy, so all texts equal the greedy one of transformers."""
    loaded = loading.load(GENERALIST, make_mesh(), Compute(), dtype="float32", context=64)
    turn = open_turn(tokenizer, None)
    settings = SelfPrompting(str(GENERALIST), 1, 20, 3, Sampling(temperature=1e-3), None, 8, 0)
    texts = self_prompts._texts(loaded, turn, settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(GENERALIST, dtype=torch.float32)
    wanted = model.generate(torch.tensor([turn.ids]), max_new_tokens=20, do_sample=False)[0, len(turn.ids) :].tolist()
    for one, _ in list(texts)[:3]:
        assert one.ids == wanted


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Which river is the longest?", None),
        ("Which river?", "too short"),
        ("Which r\ufffdver is longest?", "unreadable"),
        ("Which \x07 river is longest?", "unreadable"),
        ("I'm sorry, but I can't help with that.", "an answer"),
        ("Sure! Here are three names", "an answer"),
        ("Can you help me with my essay?", None),
        ("one two three four five six", None),
    ],
)
def test_filters(text, reason):
    filters = Filters(SETTINGS)
    assert filters.reason(made(text), text) == reason
    assert filters.reason(made(text, stopped=False), text) == "not ended"


def test_repetition_and_near_duplicates():
    """Of ten tokens there are 7 4-grams; of a text of 8 words, 4 5-grams: two of them may be known, not three."""
    filters = Filters(SETTINGS)
    ids = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]  # 3 of 7 4-grams occurred before
    assert filters.reason(made("a b c", ids), "a b c") == "repetitive"
    assert filters.reason(made("a b c", [*ids[:8], 5, 6]), "a b c") is None, "1 of 7"
    first = "w1 w2 w3 w4 w5 w6 w7 w8"
    assert filters.reason(made(first), first) is None
    third, half = "w1 w2 w3 w4 w5 w6 w7 x", "w1 w2 w3 w4 w5 w6 x y"
    assert filters.reason(made(third), third) == "a near-duplicate"
    assert filters.reason(made(half), half) is None


def test_the_files(monkeypatch, tmp_path):
    """Six texts are read until three are prompts; an evaluation question and a duplicate are not."""
    question = "How many legs do two spiders and one ant have together?"
    texts = [question, "Write a poem quickly.", "what", "Write a poem, QUICKLY", "Name three rivers.", "Sort 3, 1, 2.",
             "Never read, there are enough"]  # fmt: skip
    against = write_lines(tmp_path / "eval.jsonl", [chat_row(question.upper())])
    monkeypatch.setattr(self_prompts, "_texts", lambda *_: iter([(made(text), text) for text in texts]))
    manifest = self_prompts.build(SETTINGS, [(str(against), "test")], tmp_path / "out")
    rows = read_lines(tmp_path / "out" / "prompts.jsonl")
    assert [row["messages"][0]["content"] for row in rows] == [texts[1], texts[4], texts[5]]
    assert all(row["messages"][0]["role"] == "user" and row["source"] == "self" for row in rows)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    (part,) = manifest["parts"]
    assert (part["kept"], part["read"], part["source"]) == (3, 6, str(GENERALIST))
    assert part["dropped"] == {"a duplicate": 1, "an evaluation question": 1, "too short": 1}
    digest = hashlib.sha256((tmp_path / "out" / "prompts.jsonl").read_bytes()).hexdigest()
    assert manifest["files"] == {"prompts.jsonl": digest} and manifest["removed_as_evaluation"] == 1
    assert "self: 3 of 6 rows" in prompt_set.summary(manifest, tmp_path)
    monkeypatch.setattr(self_prompts, "_texts", lambda *_: iter([(made("what"), "what")]))
    with pytest.raises(UserError, match=r"none of 1 texts that it wrote is a prompt \(1 too short\)"):
        self_prompts.build(SETTINGS, [], tmp_path / "none")
    assert not (tmp_path / "none").exists()
