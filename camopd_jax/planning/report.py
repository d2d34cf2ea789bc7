"""A plan: compiles the programs of a run, prints what they need, and looks for flags that fit. Bytes: of one chip."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from camopd_jax.config.schema import TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.method import schedule
from camopd_jax.method.branches import find_model, teacher_names
from camopd_jax.models import hf
from camopd_jax.models.config import from_hf
from camopd_jax.models.shapes import SHAPES
from camopd_jax.planning import costs, peak, search
from camopd_jax.planning.arrays import Models, Plan, chip_bytes, plan
from camopd_jax.planning.compiling import Report, compile_all
from camopd_jax.planning.peak import Peak
from camopd_jax.planning.programs import HELD, Program, programs
from camopd_jax.planning.search import Candidate
from camopd_jax.planning.topology import Chip, Topology
from camopd_jax.runtime.mesh import MESH_AXES

GIB = 2**30
KINDS = ["reshard", "prefill", "refill", "grow", "decode", "score", "select", "gradient", "update"]
SEARCHED = ("reshard", "score", "gradient", "update", "prefill", "refill", "decode")  # the quick ones first
Row = dict[str, str]  # of a table: cells by column


@dataclass(frozen=True)
class Request:
    """What a plan is made of."""

    config: TrainConfig
    models: Models
    topology: Topology
    answer: int  # length of answers for the seconds, in tokens
    wanted: tuple[str, ...]  # beginnings of programs' names
    console: Console


def read_models(config: TrainConfig, general: str | None, specialised: str | None) -> Models:
    """The models' shapes; files, folders or names of shapes stand in for the two that every config names."""
    instead = {"general": general, "specialised": specialised}
    files: dict[str, tuple[str, dict[str, Any]]] = {}  # of each model: how errors name its config.json, what it holds
    for name, field in teacher_names(config).items():
        given = instead.get(name)
        if given in SHAPES:
            files[name] = f"shape {given}", SHAPES[given]
        elif given and not Path(given).expanduser().exists():
            names = f"the shapes are {', '.join(SHAPES)}"
            raise UserError(f"--{name}_config: {given} is neither a file, a folder nor a known shape; {names}")
        else:
            folder = Path(given).expanduser() if given else find_model(config, name, field, files=("config.json",))
            where = folder if folder.is_file() else folder / "config.json"
            files[name] = str(where), hf.read_config(folder)
    context = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    eos = files["specialised"][1].get("eos_token_id")
    shapes = {name: from_hf(values, context=context, where=where) for name, (where, values) in files.items()}
    return Models(shapes, tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))


def _compile(
    made: Plan, several: list[Program], request: Request, wanted: Sequence[str]
) -> Iterator[tuple[dict[str, int], list[Report]]]:
    """What is on a chip through the run, and the reports so far, of the programs whose names begin with a wanted word.

    Raises:
      UserError: if the run has none of these.
    """
    reports: list[Report] = []
    chosen = [program for word in wanted for program in several if program.name.startswith(word)]
    if not chosen:
        raise UserError(f"--programs={','.join(wanted)}: the run has no such program; give some of {', '.join(KINDS)}")
    compiled = compile_all(chosen, made)
    for program in chosen:
        with request.console.status(f"{program.name} …"):
            reports.append(next(compiled))
        yield peak.residents(made, several, reports), reports


# ------------------------------------------------------------------------------------------ a report


def report(request: Request) -> dict[str, Any]:
    """Compiles, prints the tables, and returns all of it for the JSON file."""
    where, say = request.topology, request.console.print
    made = plan(request.config, request.models, where.devices)
    several = programs(made)
    *_, (resident, reports) = _compile(made, several, request, request.wanted)
    peaks = peak.peaks(sum(resident.values()), reports)
    high = peak.worst(peaks)
    decode = next(program for program in several if program.name.startswith("decode"))
    cache = chip_bytes((decode.args[2].cache.keys, decode.args[2].cache.values))
    say(_header(made, where) + "\n")
    say(resident_table(resident, cache))
    say(memory_table(sum(resident.values()), reports, peaks, where.hbm))
    say(_fit_line(high, where) + "\n")
    if any(r.collectives for r in reports):
        say(collectives_table(reports, where.chip))
    say(*(f"{r.name}: {warning}" for r in reports for warning in r.warnings), sep="\n")
    values = {"topology": where.name, "devices": len(where.devices), "hbm": where.hbm}
    values |= {"mesh": dict(made.setup.mesh.shape), "residents": resident, "kv_cache": cache}
    values |= {"peaks": [vars(p) for p in peaks], "fits": where.hbm and high.fits(where.hbm)}
    values |= {"programs": [dataclasses.asdict(r) for r in reports]}
    return values | (_times(request, made, where.chip) if where.chip else {})


def _header(made: Plan, where: Topology) -> str:
    setup, config, branch = made.setup, made.setup.config, costs.largest(made.setup)
    sizes = " x ".join(f"{axis} {n}" for axis, n in setup.mesh.shape.items())
    answering = " x ".join(map(str, setup.rollout_mesh.shape.values()))
    slots = f"{setup.prompt_slots} + {config.rollout.max_response_tokens} slots"
    return (
        f"{where.name}: {setup.mesh.size} devices, mesh {sizes}; {setup.rows[branch]} rows of {slots}, {setup.dtype}\n"
        f"rollout mesh {answering}, {costs.lanes_of(setup, branch)} answers at a time; rows at a time: scoring "
        f"{setup.score_batch}, gradient {config.optimizer.micro_batch}"
    )


def _fit_line(high: Peak, where: Topology) -> str:
    at = f"The peak is {'' if high.exact else 'above '}{_gib(high.bytes)} GiB, in {high.program}"
    if where.hbm is None:
        return f"{at}; the memory of this device is not known: give --hbm_gib"
    return f"{at}, of {_gib(where.hbm)} GiB: it {'fits' if high.fits(where.hbm) else 'does not fit'}"


def _times(request: Request, made: Plan, chip: Chip) -> dict[str, Any]:
    """Seconds of a step and of the run, decoding against its limit."""
    setup, models, answer, say = made.setup, request.models, request.answer, request.console.print
    work = {phase: costs.stage_work(setup, models, phase, answer) for phase in schedule.phases(setup.config)}
    say(time_table(work, chip, setup.mesh.size, answer))
    step, run = (n * costs.step_seconds(setup, models, answer, chip) for n in (1, setup.config.steps))
    first = next(iter(work))
    rows = sum(setup.rows[name] for name in setup.rows if first in (name, schedule.MIXED))
    rate = rows * answer / work[first]["decode"].seconds(chip, setup.mesh.size)
    steps = f"the run's {setup.config.steps} steps {duration(run)}, without evaluations"
    say(f"a step at best {duration(step)}, {steps}\ndecoding: at best {rate:.4g} tokens/s of all chips")
    values = {"answer_tokens": answer, "step_seconds": step, "run_seconds": run, "decode_tokens_per_second": rate}
    return values | {"work": {phase: {name: vars(w) for name, w in of.items()} for phase, of in work.items()}}


# ------------------------------------------------------------------------------------------ the search


def look_for(request: Request, tries: int) -> dict[str, Any]:
    """The search: prints what was tried and ends in flags."""
    config, models, where, say = request.config, request.models, request.topology, request.console.print
    hbm = where.hbm
    if hbm is None:
        raise UserError("--search: the memory of this device is not known; give --hbm_gib")
    ordered = search.candidates(config, models, where, request.answer)
    if not ordered:
        raise UserError(
            f"--search: no mesh of {len(where.devices)} devices divides the models' heads and the batch of "
            f"{config.rollout.batch_size}; change config.rollout.batch_size or --topology"
        )
    words = [word for word in SEARCHED if word.startswith(request.wanted)] or request.wanted

    def compiled(candidate: Candidate) -> Peak:
        """The highest peak, or the first that is too high: the rest need not be compiled."""
        made = plan(search.changed(config, candidate.changes), models, where.devices)
        for resident, reports in _compile(made, programs(made), request, words):
            high = peak.worst(peak.peaks(sum(resident.values()), reports))
            if not high.fits(hbm):
                break
        return high

    tried = search.choose(ordered, compiled, hbm, tries)
    say(tried_table(tried, hbm))
    best, high = tried[-1]
    flags = best.flags(config) if high.fits(hbm) else None
    if flags:
        say("fits with:\n  " + " \\\n  ".join(flags))
    else:
        less = search.shorter(config, models, where)
        hint = f" By arithmetic {less} would fit, but it changes the run" if less else ""
        say(f"nothing that was tried fits.{hint}")
    rows = [vars(one) | {"peak": vars(high), "flags": one.flags(config)} for one, high in tried]
    return {"search": rows, "recommended": flags, "candidates": len(ordered)}


# ------------------------------------------------------------------------------------------ tables


def _table(title: str, rows: Sequence[Row], caption: str | None = None) -> Table:
    """Columns that are empty in all rows are left out."""
    view = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    view.title_justify = view.caption_justify = "left"
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if any(row.get(name) for row in rows)]
    for i, name in enumerate(columns):
        view.add_column(name.strip(), justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        view.add_row(*(row.get(name, "") for name in columns))
    return view


def _gib(n: float) -> str:
    return f"{n / GIB:.2f}"


def resident_table(resident: dict[str, int], cache: int) -> Table:
    lines = {name.replace("_", " "): n for name, n in resident.items()} | {"total": sum(resident.values())}
    lines |= {"KV cache at the cap, while the student answers": cache}
    rows = [{"": name, "GiB": _gib(n)} for name, n in lines.items()]
    return _table("Memory in use on a chip throughout the run, in GiB", rows)


def memory_table(resident: int, reports: Sequence[Report], peaks: Sequence[Peak], hbm: float | None) -> Table:
    """A row a program: what is on the chip, what it adds, and the peak: their sum."""
    rows = []
    for r, p in zip(reports, peaks, strict=True):
        above, held = "" if p.exact else ">", {kind: _gib(n) if n else "" for kind, n in r.holds.items()}
        row = {"": r.name, "runs": str(r.runs), "resident": _gib(resident)} | dict.fromkeys(HELD, "") | held
        row |= {"outputs": _gib(r.added) if p.exact else "", "temps": above + _gib(r.temporaries)}
        rows.append(row | {"peak": above + _gib(p.bytes), " ": verdict(p, hbm)})
    return _table(
        "Memory of a chip while each program runs, in GiB",
        rows,
        "runs: calls per step, at most. weights, cache: of the model that answers. outputs: without those that reuse "
        "the memory of a donated argument. temps: temporaries and activations; refused: the compiler stopped at this "
        "amount",
    )


def verdict(high: Peak, hbm: float | None) -> str:
    if hbm is None:
        return "?"
    if not high.exact:
        return "refused"
    return "fits" if high.fits(hbm) else f"{_gib(high.bytes - hbm)} too much"


def collectives_table(reports: Sequence[Report], chip: Chip | None) -> Table:
    rows = []
    for r in (r for r in reports if not r.same_as):
        for i, (kind, t) in enumerate(sorted(r.collectives.items(), key=lambda item: -item[1].bytes_run)):
            sent = t.bytes_run * (2 if kind == "all-reduce" else 1)
            row = {"": "" if i else r.name, "kind": kind, "occurrences": str(t.count), "runs": str(t.runs)}
            row |= {"GB, one chip": f"{t.bytes_run / 1e9:.3g}"}
            rows.append(row | {"seconds": duration(sent / (chip.ici_bandwidth / 2)) if chip else ""})
    return _table(
        "Collectives",
        rows,
        "For one call, with all loop iterations (decoding: up to the cap). seconds: at the links' peak; an all-reduce "
        "sends its data twice",
    )


def time_table(work: dict[str, dict[str, costs.Work]], chip: Chip, chips: int, answer: int) -> Table:
    """Stages of each phase at the chips' limits."""

    def row(name: str, flops: float, seconds: float, limits: dict[str, float]) -> Row:
        cells = {"": f"  {name}", "PFLOP": f"{flops / 1e15:.3g}" if flops else ""}
        cells |= {limit: duration(n) for limit, n in limits.items()} | {"seconds": duration(seconds)}
        mfu = f"{100 * flops / seconds / chips / chip.flops:.0f} %" if flops else ""
        return cells | {"bound by": max(limits, key=limits.__getitem__, default=""), "MFU": mfu}

    rows: list[Row] = []
    for phase, stages in work.items():
        each = [row(name, w.flops, w.seconds(chip, chips), w.limits(chip, chips)) for name, w in stages.items()]
        flops, seconds = sum(w.flops for w in stages.values()), sum(w.seconds(chip, chips) for w in stages.values())
        rows += [{"": phase}, *each, row("step", flops, seconds, {})]
    return _table(
        f"Seconds of a step at {chips} {chip.name} chips' limits, answers of {answer} tokens",
        rows,
        "products, HBM, links: seconds at the peak of each; a stage takes as long as the slowest, the others overlap "
        "with it. MFU: FLOPs of the model by peak FLOPs in these seconds",
    )


def duration(seconds: float) -> str:
    if seconds == 0:
        return ""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def tried_table(tried: Sequence[tuple[Candidate, Peak]], hbm: float) -> Table:
    named = {"rollout tensor": "rollout.mesh.tensor", "at a time": "rollout.concurrency"}
    named |= {"micro batch": "optimizer.micro_batch", "remat": "compute.remat", "offload": "compute.offload"}
    rows = []
    for one, high in tried:
        row = {"data x fsdp x tensor": " x ".join(str(one.changes[f"mesh.{axis}"]) for axis in MESH_AXES)}
        row |= {column: str(one.changes[name] or "all") for column, name in named.items()}
        row |= {"step at best": duration(one.seconds), "estimated": _gib(one.peak)}
        row |= {"compiled": ("" if high.exact else "> ") + _gib(high.bytes)}
        rows.append(row | {"": f"{high.program}: {verdict(high, hbm)}"})
    return _table("Search: what was compiled", rows)
