"""Makes the report page: a single HTML file without external dependencies."""

import datetime
from collections.abc import Sequence

import jinja2
import plotly.graph_objects as go
from etils import epath
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from camopd_jax.config.methods import REFERENCE_METHODS
from camopd_jax.reporting import answers, gradients, load, plots, results, sections, styles, tables
from camopd_jax.reporting.runs import Directory
from camopd_jax.reporting.sections import Panel, Section, metric_panels
from camopd_jax.reporting.styles import Styles
from camopd_jax.runtime.jsonl import atomic_file

ABOUT = {
    "results": "Results of a grid exclude the questions that were used to choose learning rates. “tuning”: learning "
    "rates are still being compared; the row is one run with the best learning rate so far.",
    "over steps": "Bands: ± one standard error, over seeds or, for a single run, over questions. Dashed: the value of "
    "the specialised model.",
    "gaps": "The gap of a token is log teacher - log student: above 0, the token is more likely for the teacher. The "
    "gap mass of an answer is the mean of its absolute or positive gaps; answers are selected by it.",
    "agreement": "Means over the tokens that are trained, for the k of config.log.agreement. The advantage is "
    "log teacher - log student, weighted by the student's probability.",
    "answers": "Answers that the student sampled. The colour of a token shows its gap: the token is more likely for "
    "the teacher, or less likely (underlined). Each pair has answers to the same prompt from the first and the last "
    "quarter of the run; if no prompt occurs in both, the answers with the largest gaps.",
    "pareto": "Up and to the right is better. Bars: ± one standard error. Dashed: the domain ability is fully kept. "
    "Hollow: the specialised model. Squares: interpolations of the two models.",
}


def write_page(folders: Sequence[str], out: str | epath.Path) -> None:
    """Writes the report on directories in their present state.

    Raises:
      UserError: for a directory that does not exist or has no run, and if the page cannot be written.
    """
    text = page(load.read(folders), datetime.datetime.now().astimezone())
    with atomic_file(out) as file:
        file.write(text)


def page(directories: Sequence[Directory], now: datetime.datetime) -> str:
    """The report as HTML. `now`: the time in its header."""
    chosen = styles.assign_styles([group for directory in directories for group in directory.groups])
    sweeps = map(tables.sweep, directories)
    settings = [
        tables.runs(chosen.groups),
        tables.configs(chosen.groups),
        tables.starts(chosen.groups),
        *sweeps,
        tables.failed(directories),
    ]
    shown = [
        _results(directories, chosen),
        Section("Recovery and retention over steps", ABOUT["over steps"], panels=sections.over_steps(chosen)),
        Section("Selection", "The answers that are trained on.", panels=metric_panels(sections.SELECTION, chosen)),
        Section("Gaps", ABOUT["gaps"], panels=metric_panels(sections.GAPS, chosen)),
        Section("Agreement", ABOUT["agreement"], panels=metric_panels(sections.AGREEMENT, chosen)),
        Section("Gradients", gradients.ABOUT, panels=gradients.panels(chosen)),
        Section("Answers", "All answers of the student.", panels=metric_panels(sections.ANSWERS, chosen)),
        Section("Optimisation", panels=metric_panels(sections.OPTIMISATION, chosen)),
        Section("Throughput", panels=sections.step_times(chosen) + metric_panels(sections.SPEED, chosen)),
        Section("Answers early and late", ABOUT["answers"], answers=answers.answer_pairs(chosen)),
        Section("Runs and settings", tables=[table for table in settings if table]),
    ]
    loader = jinja2.PackageLoader("camopd_jax.reporting", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"gap_class": answers.gap_class}
    environment.filters["json"] = lambda plot: Markup(plot.to_json(engine="json"))  # Plotly escapes "<" and "/"
    names = [directory.folder.name or str(directory.folder) for directory in directories]
    text = environment.get_template("page.html").render(
        title="camopd_jax: " + (", ".join(names) if len(names) <= 3 else f"{len(names)} directories"),
        now=now.strftime("%-d %B %Y, %H:%M %Z").strip(),
        directories=directories,
        sections=[section for section in shown if section.tables or section.panels or section.answers],
        chosen=chosen,
        styles=styles,
        themes={name: go.Figure(layout={"template": styles.template(of)}) for name, of in styles.THEMES.items()},
        limits=answers.LIMITS,
        plotly=Markup(get_plotlyjs()),
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # replaces unpaired surrogates, which cannot be written


def _results(directories: Sequence[Directory], chosen: Styles) -> Section:
    """Tables of results and differences, and a plot of recovery against retention."""
    groups = [group for group in chosen.groups if group.results]
    if not groups:
        return Section("Results")
    shown = [
        tables.outcome_of(groups),
        tables.results(groups),
        *(tables.differences(groups, method) for method in REFERENCE_METHODS),
    ]
    last = dict(results.columns(groups))  # for each measure, "mean" or the only benchmark
    panels = []
    if len(last) == 2:
        interpolation = [group for directory in directories for group in directory.interpolation]
        plot = plots.pareto(groups, interpolation, list(last.items()), chosen.colours)
        panels.append(Panel("Recovery against retention", plot, ABOUT["pareto"]))
    about = ABOUT["results"] if any(group.grid for group in groups) else ""
    return Section("Results", about, [table for table in shown if table], panels)
