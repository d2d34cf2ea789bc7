"""A plan: compiles the programs of a run, prints what they need, and looks for flags that fit. Bytes: of one chip."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
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
from camopd_jax.planning.search import Candidate, Tried
from camopd_jax.planning.topology import Chip, Topology

GIB = 2**30
KINDS = ["reshard", "prefill", "refill", "grow", "decode", "score", "select", "gradient", "update"]
SEARCHED = ("reshard", "score", "gradient", "update", "prefill", "refill", "decode")  # the quick ones first


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
    given = {"general": general, "specialised": specialised}
    names, context = teacher_names(config), config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    files = {name: _config_json(config, name, field, given.get(name)) for name, field in names.items()}
    shapes = {name: from_hf(values, context=context, where=name) for name, values in files.items()}
    eos = files["specialised"].get("eos_token_id")
    return Models(shapes, tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))


def _config_json(config: TrainConfig, name: str, field: str, instead: str | None) -> dict[str, Any]:
    if instead in SHAPES:
        return SHAPES[instead]
    if instead is None:
        return hf.read_config(find_model(config, name, field, files=("config.json",)))
    if Path(instead).expanduser().exists():
        return hf.read_config(Path(instead).expanduser())
    shapes = ", ".join(SHAPES)
    raise UserError(f"--{name}_config: {instead} is no file or folder, and no shape; the shapes are {shapes}")


def _compile(made: Plan, request: Request, wanted: Sequence[str]) -> Iterator[tuple[dict[str, int], list[Report]]]:
    """What lies there through the run, and a report of each program whose name begins with a wanted word, in the words'
    order: as many as there are so far.

    Raises:
      UserError: if the run has none of these.
    """
    several, reports = programs(made), []
    chosen = [program for word in wanted for program in several if program.name.startswith(word)]
    if not chosen:
        raise UserError(f"--programs={','.join(wanted)}: the run has none; give some of {', '.join(KINDS)}")
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
    *_, (resident, reports) = _compile(made, request, request.wanted)
    peaks = peak.peaks(sum(resident.values()), reports)
    high, cache = peak.worst(peaks), _kv_cache(programs(made))
    say(_header(made, where) + "\n")
    say(resident_table(resident, cache))
    say(memory_table(sum(resident.values()), reports, peaks, where.hbm))
    say(_fit_line(high, where) + "\n")
    say(collectives_table(reports, where.chip))
    for r in reports:
        for warning in r.warnings:
            say(f"{r.name}: {warning}")
    values: dict[str, Any] = {
        "topology": where.name,
        "devices": len(where.devices),
        "hbm": where.hbm,
        "mesh": dict(made.setup.mesh.shape),
        "residents": resident,
        "kv_cache": cache,
        "peaks": [vars(p) for p in peaks],
        "fits": where.hbm and high.fits(where.hbm),
        "programs": [dataclasses.asdict(r) for r in reports],
    }
    return values | (_times(request, made, where.chip) if where.chip else {})


def _header(made: Plan, where: Topology) -> str:
    setup, config = made.setup, made.setup.config
    sizes = " x ".join(f"{axis} {n}" for axis, n in setup.mesh.shape.items())
    answering = " x ".join(map(str, setup.rollout_mesh.shape.values()))
    branch, slots = costs.largest(setup), f"{setup.prompt_slots} + {config.rollout.max_response_tokens} slots"
    return (
        f"{where.name}: {len(where.devices)} devices, mesh {sizes}; {setup.rows[branch]} rows of {slots}, "
        f"{setup.dtype}\nanswers on {answering}, {costs.lanes_of(setup, branch)} at a time; scores of "
        f"{setup.score_batch}, gradients of {config.optimizer.micro_batch}"
    )


def _kv_cache(several: Sequence[Program]) -> int:
    """Bytes of keys and values, where answers have their cap's length."""
    cache = next(program.args[2].cache for program in several if program.name.startswith("decode"))
    return chip_bytes((cache.keys, cache.values))


def _fit_line(high: Peak, where: Topology) -> str:
    at = f"The peak is {'' if high.exact else 'above '}{_gib(high.bytes)} GiB, in {high.program}"
    if where.hbm is None:
        return f"{at}; this device does not say how much it has (--hbm_gib)"
    return f"{at}, of {_gib(where.hbm)} GiB: it {'fits' if high.fits(where.hbm) else 'does not fit'}"


def _times(request: Request, made: Plan, chip: Chip) -> dict[str, Any]:
    """Seconds of a step and of the run, decoding against its limit."""
    setup, answer, chips, steps = made.setup, request.answer, made.setup.mesh.size, request.config.steps
    phases = schedule.phases(setup.config)
    work = {phase: costs.stage_work(setup, request.models, phase, answer) for phase in phases}
    request.console.print(time_table(work, chip, chips, answer))
    step, first = costs.step_seconds(setup, request.models, answer, chip), next(iter(phases))
    rows = sum(setup.rows[name] for name in setup.rows if first in (name, schedule.MIXED))
    rate = rows * answer / work[first]["decode"].seconds(chip, chips)
    request.console.print(
        f"a step at best {duration(step)}, the run's {steps} steps {duration(step * steps)}, without evaluations\n"
        f"decoding: at best {rate:.4g} tokens/s of all chips"
    )
    return {
        "answer_tokens": answer,
        "step_seconds": step,
        "run_seconds": step * steps,
        "decode_tokens_per_second": rate,
        "work": {phase: {name: vars(w) for name, w in stages.items()} for phase, stages in work.items()},
    }


# ------------------------------------------------------------------------------------------ the search


def look_for(request: Request, tries: int) -> dict[str, Any]:
    """The search: prints what was tried and ends in flags."""
    config, models, where, say = request.config, request.models, request.topology, request.console.print
    if where.hbm is None:
        raise UserError("--search needs to know a device's memory; give --hbm_gib")
    ordered = search.candidates(config, models, where, request.answer)
    if not ordered:
        raise UserError(
            f"--search: no mesh of {len(where.devices)} devices divides the models' heads and the batch of "
            f"{config.rollout.batch_size}; change config.rollout.batch_size or --topology"
        )
    words = [word for word in SEARCHED if word.startswith(request.wanted)] or request.wanted

    def compiled(candidate: Candidate) -> Peak:
        """The highest peak, or the first that is too high: the compiler need not be asked for the rest."""
        made = plan(search.changed(config, candidate.changes), models, where.devices)
        for resident, reports in _compile(made, request, words):
            high = peak.worst(peak.peaks(sum(resident.values()), reports))
            if not high.fits(where.hbm):
                break
        return high

    best, tried = search.choose(ordered, compiled, where.hbm, tries)
    say(tried_table(tried, where.hbm))
    if best:
        say("fits with:\n  " + " \\\n  ".join(best.flags(config)))
    else:
        less = search.shorter(config, models, where)
        say("nothing that was tried fits." + (f" By arithmetic {less} would; it changes the run" if less else ""))
    return {
        "search": [
            dataclasses.asdict(t.candidate) | {"peak": vars(t.peak), "flags": t.candidate.flags(config)} for t in tried
        ],
        "recommended": best and best.flags(config),
        "candidates": len(ordered),
    }


# ------------------------------------------------------------------------------------------ tables


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> Table:
    left = {"title_justify": "left", "caption_justify": "left"}
    view = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, **left)
    for i, name in enumerate(columns):
        view.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        view.add_row(*row)
    return view


def _gib(n: float | None) -> str:
    return "" if n is None else f"{n / GIB:.2f}"


def resident_table(resident: dict[str, int], cache: int) -> Table:
    rows = [(name.replace("_", " "), _gib(n)) for name, n in resident.items()]
    rows.append(("[bold]together", f"[bold]{_gib(sum(resident.values()))}"))
    rows.append(("[dim]KV cache at the cap, while the student answers", f"[dim]{_gib(cache)}"))
    return _table("What lies on a chip through the run, in GiB", ("", "GiB"), rows)


def memory_table(resident: int, reports: Sequence[Report], peaks: Sequence[Peak], hbm: float | None) -> Table:
    """A row a program: what lies there, what it adds, and the peak: their sum."""
    kinds = [kind for kind in HELD if any(r.holds.get(kind) for r in reports)]
    rows = []
    for r, p in zip(reports, peaks, strict=True):
        above = "" if p.exact else ">"
        held = (_gib(r.holds.get(kind) or None) for kind in kinds)
        added = _gib(r.added if p.exact else None), above + _gib(r.temporaries)
        rows.append((r.name, str(r.runs), _gib(resident), *held, *added, above + _gib(p.bytes), verdict(p, hbm)))
    return _table(
        "Memory of a chip while each program runs, in GiB",
        ("", "runs", "resident", *kinds, "outputs", "temps", "peak", ""),
        rows,
        "runs: in a step, at most. weights, cache: of the answering model. outputs: beyond those in a donated "
        "argument's place. temps: temporaries and activations; refused: the compiler gave up at these",
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
        for i, (kind, t) in enumerate(sorted(r.collectives.items(), key=lambda kv: -kv[1].bytes_run)):
            sent = t.bytes_run * (2 if kind == "all-reduce" else 1)
            seconds = duration(sent / (chip.ici_bandwidth / 2)) if chip else ""
            rows.append(("" if i else r.name, kind, str(t.count), str(t.runs), f"{t.bytes_run / 1e9:.3g}", seconds))
    return _table(
        "Collectives" if rows else "No collectives",
        ("", "kind", "in the text", "runs", "GB of a chip", "seconds"),
        rows,
        "Of one run of the program, with every loop's trips; turns of decoding to the cap. seconds: at the links' "
        "peak, where an all-reduce goes around twice",
    )


def time_table(work: dict[str, dict[str, costs.Work]], chip: Chip, chips: int, answer: int) -> Table:
    """Stages of each phase at the chips' limits."""

    def row(name: str, flops: float, seconds: float, limits: Sequence[float], bound: str = "") -> Sequence[str]:
        mfu = f"{100 * flops / seconds / chips / chip.flops:.0f} %" if flops else ""
        pflop = f"{flops / 1e15:.3g}" if flops else ""
        return (f"  {name}", pflop, *map(duration, limits), duration(seconds), bound, mfu)

    rows: list[Sequence[str]] = []
    for phase, stages in work.items():
        rows.append((f"[bold]{phase}",))
        for name, w in stages.items():
            limits = w.limits(chip, chips)
            bound = max(limits, key=limits.__getitem__)
            rows.append(row(name, w.flops, limits[bound], [*limits.values()], bound))
        seconds = sum(w.seconds(chip, chips) for w in stages.values())
        rows.append(row("step", sum(w.flops for w in stages.values()), seconds, (0, 0, 0)))
    return _table(
        f"Seconds of a step at {chips} {chip.name} chips' limits, answers of {answer} tokens",
        ("", "PFLOP", "products", "HBM", "links", "seconds", "bound by", "MFU"),
        rows,
        "products, HBM, links: each at its peak; a stage takes as long as the slowest, the others hidden behind it. "
        "MFU: the model's FLOPs by the peak in those seconds",
    )


def duration(seconds: float) -> str:
    if seconds == 0:
        return ""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def tried_table(tried: Sequence[Tried], hbm: float) -> Table:
    names = ("rollout.mesh.tensor", "rollout.concurrency", "optimizer.micro_batch", "compute.remat", "compute.offload")
    rows = []
    for t in tried:
        rows.append(
            (
                " x ".join(str(t.candidate.changes[f"mesh.{axis}"]) for axis in ("data", "fsdp", "tensor")),
                *(str(t.candidate.changes[name]) for name in names),
                duration(t.candidate.seconds),
                _gib(t.candidate.peak),
                ("" if t.peak.exact else "> ") + _gib(t.peak.bytes),
                f"{t.peak.program}: {verdict(t.peak, hbm)}",
            )
        )
    columns = (
        "rollout tensor",
        "concurrency",
        "micro batch",
        "remat",
        "offload",
        "step at best",
        "estimated",
        "compiled",
    )
    return _table("Search: what the compiler was asked", ("data x fsdp x tensor", *columns, ""), rows)
