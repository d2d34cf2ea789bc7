"""IFEval: the results of the official checkers, and the four figures computed from them."""

import pytest

from camopd_jax.config.schema import Benchmark, Evaluation
from camopd_jax.errors import UserError
from camopd_jax.evals import runner
from camopd_jax.evals.graders import ifeval


def row(*instructions):
    names, kwargs = zip(*instructions, strict=True)
    return {"prompt": "Write.", "key": 1, "instruction_id_list": list(names), "kwargs": list(kwargs)}


COMMAS = ("punctuation:no_comma", {})
WORDS = ("length_constraints:number_words", {"relation": "at least", "num_words": 3, "num_bullets": None})
LOWER = ("change_case:english_lowercase", {})


def figures(answer, *instructions):
    grade = ifeval.grade(answer, row(*instructions))
    parts = grade.parts
    return grade.value, parts["prompt_loose"][0], parts["instruction_strict"], parts["instruction_loose"]


def test_strict_and_loose_by_prompt_and_by_instruction():
    assert figures("one two three four", COMMAS, WORDS) == (1, 1, (2, 2), (2, 2))
    assert figures("one two", COMMAS, WORDS) == (0, 0, (1, 2), (1, 2))
    assert figures("", COMMAS) == (0, 0, (0, 1), (0, 1)), "an empty answer follows nothing"


def test_loose_accepts_an_additional_first_line():
    assert figures("Sure, here it is:\nno commas in this", COMMAS) == (0, 1, (0, 1), (1, 1))


def test_grading_is_deterministic():
    """langdetect is random unless its seed is set."""
    answer = "nur ein wort mehr than one language and so on"
    assert len({figures(answer, LOWER) for _ in range(5)}) == 1


@pytest.mark.parametrize(
    "name, kwargs, good, bad",
    [
        (
            "length_constraints:number_sentences",
            {"relation": "less than", "num_sentences": 3},
            "One. Two.",
            "One went. Two came. Three saw.",
        ),
        (
            "change_case:capital_word_frequency",
            {"capital_relation": "at least", "capital_frequency": 2},
            "THIS is LOUD",
            "this is quiet",
        ),
    ],
)
def test_the_checkers_that_split_sentences_work_without_a_download(name, kwargs, good, bad):
    assert figures(good, (name, kwargs))[0] == 1 and figures(bad, (name, kwargs))[0] == 0


def test_the_error_names_missing_packages(monkeypatch):
    monkeypatch.setattr(ifeval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"task ifeval: its checkers need lm_eval, .*pip install 'camopd_jax\[eval\]'"):
        ifeval.check()


def test_a_line_names_the_missing_sentence_splitter_before_a_run(monkeypatch, tmp_path):
    """In place of a Python warning when answers are graded."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    evaluation = Evaluation(benchmarks=(Benchmark("instructions", "ifeval"), Benchmark("more", "ifeval")))
    (line,) = runner.notices(evaluation)
    assert "`python -m nltk.downloader punkt_tab` gets it" in line
    (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)
    assert runner.notices(evaluation) == []
