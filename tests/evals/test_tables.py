"""The tables that commands print."""

import io
import itertools

from results import scored
from rich.console import Console

from camopd_jax.config.schema import Benchmark
from camopd_jax.evals import tables
from camopd_jax.evals.results import summarise
from camopd_jax.evals.task import Grade


def text(table, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def models(*names):
    shares = itertools.cycle([(100, 100, 0), (20, 40, 100), (80, 70, 95)])
    return {
        name: [
            scored([1] * n + [0] * (100 - n), bench, axis)
            for n, (bench, axis) in zip(
                of, (("covered", "general"), ("uncovered", "general"), ("medqa", "domain")), strict=True
            )
        ]
        for name, of in zip(names, shares, strict=False)
    }


def test_the_table_fits_eighty_columns():
    shown = text(tables.accuracies(models("general", "specialised", "student")))
    lines = {line.split("  ")[0].strip(): line for line in shown.splitlines()}
    assert "75 ± 5 %" in lines["general: covered"] and "95 ± 2 %" in lines["domain: medqa"]
    assert all(part in lines["general: uncovered"] for part in ("100.0", "40.0", "70.0", "50 ± "))
    assert all(part in lines["general: mean"] for part in ("100.0", "30.0", "75.0"))
    assert "recovered" in shown and "…" not in shown


def test_a_single_model_has_no_comparison_columns():
    shown = text(tables.accuracies(models("mine")))
    assert "mine" in shown and "back" not in shown


def test_details_of_answers():
    benchmark = Benchmark("ifeval", samples=2, temperature=0.7, top_p=0.9, max_response_tokens=384)
    grades = [[Grade(1.0, parts={"prompt_loose": (1, 1)}), Grade(0.0, False)]]
    row = summarise(benchmark, grades, [10, 20], [True, False])
    shown = text(tables.details({"mine": [row], "student": [row]}), 120)
    for part in ("ifeval: 1 questions", "2 at T 0.7, top_p 0.9, at most 384 tokens", "15", "50", "prompt loose 100.0"):
        assert part in shown
    assert shown.count("prompt loose") == 2 and "recovered" in shown and "…" not in shown
