"""Puts the page together: one HTML file that needs nothing beside it."""

import datetime
from collections.abc import Sequence

import jinja2
from etils import epath

from camopd_jax.config.methods import INTERPOLATION
from camopd_jax.reporting import answers, diagnosis, directories, figures, outcomes, svg, tables
from camopd_jax.reporting.blocks import Cell, Figure, Section, Table
from camopd_jax.reporting.cast import Cast, cast
from camopd_jax.reporting.outcomes import Column, Outcome, estimate
from camopd_jax.reporting.pareto import Point, pareto
from camopd_jax.reporting.runs import Group, Source
from camopd_jax.reporting.svg import WIDE
from camopd_jax.runtime.jsonl import atomic_file

TINTS = (
    "The student's own answers. Each token is tinted by its gap: the teacher holds it likelier than the student does, "
    "or less likely (underlined). Shown are answers to one prompt that came in the first and again in the last quarter "
    "of the run, and else those of both with the largest gaps."
)


def write_page(folders: Sequence[str], out: str | epath.Path) -> None:
    """Writes the report on some directories, as it stands now.

    Raises:
      UserError: for a directory that is not there or holds no run, and if the page cannot be written.
    """
    text = page(directories.read(folders), datetime.datetime.now().astimezone())
    with atomic_file(out) as file:
        file.write(text)


def page(sources: Sequence[Source], now: datetime.datetime) -> str:
    """The report as HTML. `now`: the time that its header tells."""
    drawn = cast([group for source in sources for group in source.groups])
    samples = Section("Answers early and late", TINTS, pairs=answers.pairs(drawn))
    sections = [
        results(sources, drawn),
        figures.over_steps(drawn),
        figures.selection(drawn),
        figures.gaps(drawn),
        diagnosis.section(drawn),
        figures.answers(drawn),
        figures.optimisation(drawn),
        figures.throughput(drawn),
        samples,
        settings(sources, drawn),
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("camopd_jax.reporting", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("page.html").render(
        title=_title(sources),
        counts=_counts(sources),
        read=[_told(source) for source in sources],
        now=now.strftime("%-d %B %Y, %H:%M %Z").strip(),
        sections=[section for section in sections if section],
        failed=_failed(sources),
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair in an answer cannot be written


def results(sources: Sequence[Source], drawn: Cast) -> Section:
    """The tables of shares and differences, and recovery against retention."""
    found = [of for group in drawn.groups if (of := outcomes.outcome(group))]
    if not found:
        return Section("Results")
    against = [tables.differences(found, drawn, method) for method in outcomes.references(found)]
    return Section(
        "Results",
        _results_note(found),
        figures=_pareto(found, sources, drawn),
        tables=[tables.results(found, drawn), *(table for table in against if table)],
    )


def _results_note(found: Sequence[Outcome]) -> str:
    notes = []
    if any(of.group.origin for of in found):
        notes.append("Results of a grid are of the questions that did not choose its learning rates.")
    if any(of.group.tuning for of in found):
        notes.append("“tuning”: the grid is still choosing; the best learning rate so far, one run.")
    return " ".join(notes)


def _pareto(found: Sequence[Outcome], sources: Sequence[Source], drawn: Cast) -> list[Figure]:
    back, kept = (_last(found, measure) for measure in ("recovery", "retention"))
    if back is None or kept is None:
        return []
    points = [Point(of.group.name, drawn.style(of.group), x, y) for of in found
              if (x := estimate(of, back)) and (y := estimate(of, kept))]  # fmt: skip
    between = []
    for source in sources:
        for weight, run in source.between.items():
            of = outcomes.outcome(Group(INTERPOLATION, INTERPOLATION, str(source.folder), {0: run}, weight))
            if of and (x := estimate(of, back)) and (y := estimate(of, kept)):
                between.append((weight, x, y))
    if not points:
        return []
    title = "What came back against what was kept"
    note = "Up and to the right is better. Bars: ± one standard error. Dashed: all of the domain is kept. Hollow: the "
    note += "specialised model, which every student starts as."
    if between:
        note += " Squares: the weighted mean of the two models' parameters, without training."
    return [Figure(title, svg.draw(pareto(points, between), title, WIDE, left=58), note=note, wide=True)]


def _last(found: Sequence[Outcome], measure: str) -> Column | None:
    """The column of an axis's mean, or of its only benchmark."""
    return next((column for column in reversed(outcomes.columns(found)) if column[0] == measure), None)


def settings(sources: Sequence[Source], drawn: Cast) -> Section:
    """Which runs these are, how their configs differ, and how grids chose their learning rates."""
    found: list[Table | None] = [tables.essentials(drawn), tables.configs(drawn) if len(drawn.groups) > 1 else None]
    found += [table for source in sources for table in tables.sweep(source)]
    return Section("Runs and settings", tables=[table for table in found if table])


# ----------------------------------------------------------------------------------- the header


def _title(sources: Sequence[Source]) -> str:
    names = [source.folder.name or str(source.folder) for source in sources]
    return "camopd_jax: " + (", ".join(names) if len(names) <= 3 else f"{len(names)} runs")


def _counts(sources: Sequence[Source]) -> str:
    found, ended = sum(source.found for source in sources), sum(source.ended for source in sources)
    return f"{len(sources)} directories, {found} runs, {ended} ended" + (
        f", {found - ended} not" if ended < found else ""
    )


def _told(source: Source) -> str:
    kind = "grid" if source.is_grid else "run"
    state = "ended" if source.ended == source.found else "in progress"
    if not source.is_grid:
        run = source.groups[0].run
        return f"{source.folder}: a {kind}, {state}, {run.steps} of {run.config['steps']} steps"
    seconds = (
        f", the last start took {source.study['seconds'] / 60:.0f} minutes"
        if source.study and "seconds" in source.study
        else ""
    )
    if source.study:
        failed = f", {len(source.study['failed'])} failed" if source.study.get("failed") else ""
        return f"{source.folder}: a grid, ended, {source.found} runs{failed}{seconds}"
    return f"{source.folder}: a grid, in progress, {source.found} runs so far, {source.ended} of them ended"


def _failed(sources: Sequence[Source]) -> Table | None:
    rows = [[Cell(folder), Cell(reason)] for source in sources if source.study
            for folder, reason in source.study.get("failed", {}).items()]  # fmt: skip
    return Table("Runs that failed.", ["run", "reason"], rows) if rows else None
