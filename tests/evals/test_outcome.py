"""The outcome of a run in words."""

from camopd_jax.config.schema import Benchmark
from camopd_jax.evals.outcome import outcome
from camopd_jax.evals.results import summarise
from camopd_jax.evals.task import Grade


def results(**right):
    """Results on 100 questions of each benchmark, the first of which are right."""
    axes = {"sums": "general", "logic": "general", "drugs": "domain"}
    return [summarise(Benchmark(name, axis=axes[name]), [[Grade(float(i < n))] for i in range(100)], [3] * 100,
                      [True] * 100) for name, n in right.items()]  # fmt: skip


GENERAL, SPECIALISED = results(sums=100, logic=100, drugs=0), results(sums=50, logic=0, drugs=90)


def test_by_hand():
    """Back: (100 - 50) / 50 of sums, 40 / 100 of logic, (50 + 40) / 150 of both; kept 45 of 90.

    The standard errors: of 100 questions with residuals 0.6 (40) and -0.4 (60) divided by 1: 0.492 / 10; half of that
    over the mean loss 0.75; of 45 questions with 0.5 and 45 with -0.5, divided by 0.9: 0.4767 / 9.
    """
    rows = outcome(GENERAL, SPECIALISED, results(sums=100, logic=40, drugs=45), {"logic": False})
    assert rows[:2] == [
        ("came back", "60 ± 4 % of the lost general ability (sums 100 ± 0 %, logic 40 ± 5 %)"),
        ("was kept", "50 ± 5 % of the domain"),
    ]
    assert [what for what, _ in rows[2:]] == ["did not come back", "was not kept"]
    assert rows[2][1].startswith("60 % of logic; no prompt covers it")
    assert rows[3][1].startswith("50 % of the domain")


def test_a_loss_within_two_standard_errors_is_none():
    """98 of 100: 0.02 +- 0.014; 95 of 100: 0.05 +- 0.022."""
    rows = outcome(GENERAL, SPECIALISED, results(sums=100, logic=98, drugs=90), {})
    assert [what for what, _ in rows] == ["came back", "was kept"]
    rows = outcome(GENERAL, SPECIALISED, results(sums=100, logic=95, drugs=90), {"logic": True})
    assert [what for what, _ in rows] == ["came back", "was kept", "did not come back"]
    assert "5 % of logic; prompts cover it" in rows[2][1]


def test_without_benchmarks_of_an_axis():
    general, specialised, student = ([one for one in of if one["axis"] == "general"] for of in
                                     (GENERAL, SPECIALISED, results(sums=75, logic=100, drugs=0)))  # fmt: skip
    assert [what for what, _ in outcome(general, specialised, student, {})] == ["came back", "did not come back"]
    assert outcome([], [], [], {}) == []
