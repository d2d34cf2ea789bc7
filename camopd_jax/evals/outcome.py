"""The outcome of a run in words: what came back, what was kept, and what did not come back."""

from collections.abc import Mapping, Sequence

from camopd_jax.evals.comparison import Ratio, kept_share, recovered_share
from camopd_jax.evals.results import Result, on_axis

ERRORS = 2.0  # a share that is below 1 by more standard errors is a loss
REASONS = {
    True: "prompts cover it: raise config.steps, or set the branch's prompts.weights",
    False: "no prompt covers it: add prompts, or let the original write them (`prompts self`)",
    None: "config.evaluation.benchmarks does not say whether prompts cover it",
}


def outcome(
    general: Sequence[Result],
    specialised: Sequence[Result],
    student: Sequence[Result],
    covered: Mapping[str, bool | None],
) -> list[tuple[str, str]]:
    """Rows (what, how much) about a student.

    Args:
      general, specialised, student: results on the same questions.
      covered: of each benchmark, whether the prompts cover its ability.
    """
    models = (general, specialised, student)
    on_general = [on_axis(results, "general") for results in models]
    on_domain = [on_axis(results, "domain") for results in models]
    by_name = {result["benchmark"]: recovered_share(*([model[i]] for model in on_general))
               for i, result in enumerate(on_general[-1])}  # fmt: skip
    shares = {name: share for name, share in by_name.items() if share is not None}
    rows = []
    if mean := recovered_share(*on_general):
        parts = ", ".join(f"{name} {_percent(share)}" for name, share in shares.items())
        rows.append(("came back", f"{_percent(mean)} of the lost general ability ({parts})"))
    if kept := kept_share(*on_domain[1:]):
        rows.append(("was kept", f"{_percent(kept)} of the domain"))
    for name, share in shares.items():
        if share.value + ERRORS * share.error < 1:
            rows.append(
                ("did not come back", f"{100 - 100 * share.value:.0f} % of {name}; {REASONS[covered.get(name)]}")
            )
    if kept and kept.value + ERRORS * kept.error < 1:
        rows.append(("was not kept", f"{100 - 100 * kept.value:.0f} % of the domain; give review more `steps`"))
    return rows


def _percent(share: Ratio) -> str:
    return f"{100 * share.value:.0f} ± {100 * share.error:.0f} %"
