import io
import math

import pytest
from rich.console import Console

from camopd_jax.config import Benchmark
from camopd_jax.evals import report


def result(name, axis, accuracy, error=0.01):
    return {"benchmark": name, "axis": axis, "accuracy": accuracy, "standard_error": error}


def test_a_result_by_hand():
    row = report.result(Benchmark("sums", "x", "general", "exact"), ["1", "2", 3, "4"], ["1", "9", "3", "4"],
                        [1, 2, 3, 6], [True, True, True, False])  # fmt: skip
    assert row["accuracy"] == 0.75 and row["n"] == 4 and row["length_mean"] == 3
    assert row["truncated"] == 0.25 and row["unmarked"] == 0
    assert row["standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_axis_mean_and_its_error():
    rows = [result("a", "general", 0.5, 0.03), result("b", "general", 0.7, 0.04), result("c", "domain", 0.1)]
    assert report.axis_mean(rows, "general") == (pytest.approx(0.6), pytest.approx(0.025))
    assert report.axis_mean(rows[:2], "domain") is None


def test_recovery_and_retention():
    assert report.recovery(0.8, 0.4, 0.7) == pytest.approx(0.75)
    assert report.recovery(0.4, 0.4, 0.7) is None
    assert report.retention(0.5, 0.4) == pytest.approx(0.8)
    assert report.retention(0.0, 0.4) is None


def test_the_table_fits_eighty_columns():
    models = [[result("covered", "general", g), result("uncovered", "general", u), result("medqa", "domain", d)]
              for g, u, d in ((1.0, 1.0, 0.0), (0.2, 0.4, 1.0), (0.8, 0.7, 0.95))]  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table(*models))
    lines = console.export_text().splitlines()
    (covered,) = (line for line in lines if "general: covered" in line)
    (uncovered,) = (line for line in lines if "general: uncovered" in line)
    (domain,) = (line for line in lines if "domain: medqa" in line)
    (mean,) = (line for line in lines if "mean" in line)
    assert "75 %" in covered and "95 %" in domain
    assert all(part in uncovered for part in ("100.0", "40.0", "70.0", "50 %"))
    assert all(part in mean for part in ("100.0", "30.0", "75.0"))
    assert not any("…" in line for line in lines)
