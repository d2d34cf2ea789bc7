"""Puts the page together: one HTML file that needs nothing beside it."""

import datetime
from collections.abc import Sequence

import jinja2
import plotly.graph_objects as go
from etils import epath
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from camopd_jax.config.methods import AGAINST
from camopd_jax.reporting import answers, gradients, load, plots, results, sections, styles, tables
from camopd_jax.reporting.runs import Source
from camopd_jax.reporting.sections import Panel, Section, metric_panels
from camopd_jax.reporting.styles import Styles
from camopd_jax.runtime.jsonl import atomic_file

ABOUT = {
    "results": "Results of a grid are of the questions that did not choose its learning rates. “tuning”: the grid is "
    "still choosing; the best learning rate so far, one run.",
    "over steps": "Bands: ± one standard error, over seeds or, of a run alone, over questions. Dashed: where the "
    "specialised model is, which the student starts as.",
    "gaps": "The signal: how much more likely the teacher finds the student's own tokens. An answer's score is made of "
    "its gaps, and decides whether it is selected.",
    "answers": "The student's own answers. Each token is tinted by its gap: the teacher finds it more likely than the "
    "student does, or less likely (underlined). Shown are answers to one prompt that came in the first and again in "
    "the last quarter of the run, and else those of both with the largest gaps.",
    "pareto": "Up and to the right is better. Bars: ± one standard error. Dashed: all of the domain is kept. Hollow: "
    "the specialised model, which every student starts as. Squares: the weighted mean of the two models' parameters.",
}


def write_page(folders: Sequence[str], out: str | epath.Path) -> None:
    """Writes the report on directories, as they are now.

    Raises:
      UserError: for a directory that is not there or holds no run, and if the page cannot be written.
    """
    text = page(load.read(folders), datetime.datetime.now().astimezone())
    with atomic_file(out) as file:
        file.write(text)


def page(sources: Sequence[Source], now: datetime.datetime) -> str:
    """The report as HTML. `now`: the time in its header."""
    chosen = styles.choose_styles([group for source in sources for group in source.groups])
    sweeps = map(tables.sweep, sources)
    settings = [tables.runs(chosen.groups), tables.configs(chosen.groups), *sweeps, tables.failed(sources)]
    shown = [
        _results(sources, chosen),
        Section("Recovery and retention over steps", ABOUT["over steps"], panels=sections.over_steps(chosen)),
        Section("Selection", "Which answers are trained on.", panels=metric_panels(sections.SELECTION, chosen)),
        Section("Gaps", ABOUT["gaps"], panels=metric_panels(sections.GAPS, chosen)),
        Section("Gradients", gradients.ABOUT, panels=gradients.panels(chosen)),
        Section("Answers", "Of the student, before any are selected.", panels=metric_panels(sections.ANSWERS, chosen)),
        Section("Optimisation", panels=metric_panels(sections.OPTIMISATION, chosen)),
        Section("Throughput", panels=sections.step_times(chosen) + metric_panels(sections.SPEED, chosen)),
        Section("Answers early and late", ABOUT["answers"], answers=answers.answer_pairs(chosen)),
        Section("Runs and settings", tables=[table for table in settings if table]),
    ]
    loader = jinja2.PackageLoader("camopd_jax.reporting", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"tint": answers.tint}
    environment.filters["json"] = lambda plot: Markup(plot.to_json(engine="json"))  # Plotly escapes "<" and "/"
    names = [source.folder.name or str(source.folder) for source in sources]
    text = environment.get_template("page.html").render(
        title="camopd_jax: " + (", ".join(names) if len(names) <= 3 else f"{len(names)} directories"),
        now=now.strftime("%-d %B %Y, %H:%M %Z").strip(),
        sources=sources,
        sections=[section for section in shown if section.tables or section.panels or section.answers],
        chosen=chosen,
        styles=styles,
        themes={name: go.Figure(layout={"template": styles.template(of)}) for name, of in styles.THEMES.items()},
        limits=answers.LIMITS,
        plotly=Markup(get_plotlyjs()),
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair in an answer cannot be written


def _results(sources: Sequence[Source], chosen: Styles) -> Section:
    """The tables of results and differences, and recovery against retention."""
    groups = [group for group in chosen.groups if group.results]
    if not groups:
        return Section("Results")
    shown = [tables.results(groups), *(tables.differences(groups, method) for method in AGAINST)]
    last = dict(results.columns(groups))  # of each measure the mean, or its only benchmark
    panels = []
    if len(last) == 2:
        interpolation = [group for source in sources for group in source.interpolation]
        plot = plots.pareto(groups, interpolation, list(last.items()), chosen.colours)
        panels.append(Panel("Recovery against retention", plot, ABOUT["pareto"]))
    about = ABOUT["results"] if any(group.grid for group in groups) else ""
    return Section("Results", about, [table for table in shown if table], panels)
