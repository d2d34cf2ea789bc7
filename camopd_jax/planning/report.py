"""A plan: compiles a run's programs, prints what they need, and searches for flags that fit. Bytes are of one chip."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from camopd_jax.config.schema import TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.inference import loading
from camopd_jax.method.branches import find_model, teacher_names
from camopd_jax.models import hf
from camopd_jax.models.config import ModelConfig, from_hf
from camopd_jax.models.peft_settings import base_folder
from camopd_jax.models.shapes import SHAPES
from camopd_jax.planning import costs, search
from camopd_jax.planning.arrays import FILES, ModelShapes, Plan, chip_bytes, make_models, plan
from camopd_jax.planning.compiling import Peak, Report, compile_program, peak
from camopd_jax.planning.programs import Program, programs, residents
from camopd_jax.planning.search import Candidate
from camopd_jax.planning.speed import duration
from camopd_jax.planning.topology import Chip, Topology
from camopd_jax.runtime.paths import in_home

GIB = 2**30
KINDS = ("reshard", "score", "select", "gradient", "update", "prefill", "grow", "refill", "decode")  # quickest first
Row = dict[str, str]  # of a table: cells by column


@dataclass(frozen=True)
class Request:
    """What a plan is made of."""

    config: TrainConfig
    models: ModelShapes
    topology: Topology
    answer: int  # length of answers for the seconds, in tokens
    wanted: tuple[str, ...]  # beginnings of programs' names
    console: Console


def read_models(config: TrainConfig, general: str | None, specialised: str | None) -> ModelShapes:
    """The models' shapes; files, folders or names of shapes replace the two that every config names."""
    instead = {"general": general, "specialised": specialised}
    context = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    shapes: dict[str, ModelConfig] = {}
    folders: dict[str, Path] = {}
    values: dict[str, dict[str, Any]] = {}  # the config.json of each model
    for name, field in teacher_names(config).items():
        given = instead.get(name)
        if given in SHAPES:
            values[name] = SHAPES[given]
            shapes[name] = from_hf(values[name], context=context, where=f"shape {given}")
        elif given and not in_home(given).exists():
            names = f"the shapes are {', '.join(SHAPES)}"
            raise UserError(f"--{name}_config: {given} is neither a file, a folder nor a known shape; {names}")
        elif given and (file := in_home(given)).is_file():
            values[name] = hf.read_config(file)
            shapes[name] = from_hf(values[name], context=context, where=str(file))
        else:
            folders[name] = in_home(given) if given else find_model(config, name, field, files=FILES)
            values[name] = hf.read_config(base_folder(folders[name], FILES))
            shapes[name] = loading.model_config(folders[name], context, FILES)
    eos = values["specialised"].get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if "specialised" in folders:
        loading.check_adapter(config.adapter, folders["specialised"], "config.specialised_model")
    return make_models(config, shapes, folders, eos_ids)


def _compile(made: Plan, several: Sequence[Program], request: Request) -> Iterator[tuple[dict[str, int], list[Report]]]:
    """Compiles the wanted programs, those that are the same once.

    Yields:
      After each program: bytes on a chip through the whole run by what takes them, and the reports so far.

    Raises:
      UserError: if the run has no wanted program.
    """
    chosen = [program for program in several if program.name.startswith(request.wanted)]
    if not chosen:
        wanted = ",".join(request.wanted)
        raise UserError(f"--programs={wanted}: the run has no such program; give some of {', '.join(KINDS)}")
    kept, reports, first = residents(made, several), list[Report](), dict[Hashable, Report]()
    for program in chosen:
        if same := first.get(program.key):
            name, runs, holds = program.name, program.runs, dict(program.holds)
            reports.append(replace(same, name=name, runs=runs, holds=holds, same_as=same.name))
        else:
            with request.console.status(f"{program.name} …"):
                reports.append(compile_program(program))
            first[program.key] = reports[-1]
        yield kept | {"code": sum(report.memory.get("code", 0) for report in first.values())}, reports


# ------------------------------------------------------------------------------------------ a report


def report(request: Request) -> dict[str, Any]:
    """Compiles, prints the tables, and returns all of it for the JSON file."""
    where, say = request.topology, request.console.print
    made = plan(request.config, request.models, where.devices)
    several = programs(made)
    *_, (resident, reports) = _compile(made, several, request)
    total = sum(resident.values())
    high = peak(total, reports)
    cache = next(program.args[2].cache for program in several if program.name.startswith("decode"))
    slots = chip_bytes((cache.keys, cache.values))
    say(_header(made, where))
    say("Memory in use on a chip throughout the run, in GiB:")
    say(", ".join(f"{name.replace('_', ' ')} {_gib(n)}" for name, n in resident.items()) + f"; together {_gib(total)}")
    say(f"KV cache at the cap, while the student answers: {_gib(slots)}\n")
    say(memory_table(total, reports, where.hbm))
    limit = (
        f", of {_gib(where.hbm)} GiB: it {verdict(high, where.hbm)}" if where.hbm else "; unknown limit: give --hbm_gib"
    )
    say(f"The peak is {'above ' * high.refused}{_gib(high.bytes)} GiB, in {high.program}{limit}\n")
    if any(r.collectives for r in reports):
        say(collectives_table(reports, where.chip))
    values = {"topology": where.name, "devices": len(where.devices), "hbm": where.hbm}
    values |= {"mesh": dict(made.setup.mesh.shape), "residents": resident, "kv_cache": slots}
    values |= {"peak": asdict(high), "fits": where.hbm and high.fits(where.hbm)}
    values |= {"programs": [asdict(r) | {"peak": peak(total, [r]).bytes} for r in reports]}
    return values | (_times(request, made, where.chip) if where.chip else {})


def _header(made: Plan, where: Topology) -> str:
    setup, config, rows = made.setup, made.setup.config, max(made.setup.rows.values())
    sizes = " x ".join(f"{axis} {n}" for axis, n in setup.mesh.shape.items())
    answering = " x ".join(map(str, setup.rollout_mesh.shape.values()))
    return (
        f"{where.name}: {setup.mesh.size} devices, mesh {sizes}; {rows} rows of {setup.prompt_slots} + "
        f"{config.rollout.max_response_tokens} slots, {setup.dtype}\n"
        f"rollout mesh {answering}, {costs.lanes_of(setup, rows)} answers at a time; rows at a time: scoring "
        f"{setup.score_batch}, gradient {setup.micro_batch}\n"
    )


def _times(request: Request, made: Plan, chip: Chip) -> dict[str, Any]:
    """Prints and returns the seconds of a step and of the run, and the rate of decoding."""
    setup, answer, say = made.setup, request.answer, request.console.print
    work, chips, steps = costs.step_work(setup, request.models, answer), setup.mesh.size, setup.config.steps
    say(time_table(work, chip, chips, answer))
    step = sum(w.seconds(chip, chips) for w in work.values())
    rate = max(setup.rows.values()) * answer / work["decode"].seconds(chip, chips)
    say(f"a step at best {duration(step)}, the run's {steps} steps {duration(steps * step)}, without evaluations")
    say(f"decoding: at best {rate:.4g} tokens/s of all chips")
    values = {"answer_tokens": answer, "step_seconds": step, "run_seconds": steps * step}
    return values | {"decode_tokens_per_second": rate, "work": {name: w._asdict() for name, w in work.items()}}


# ------------------------------------------------------------------------------------------ the search


def look_for(request: Request, tries: int) -> dict[str, Any]:
    """The search: prints what was tried and ends in flags."""
    config, where, say = request.config, request.topology, request.console.print
    hbm = where.hbm
    if hbm is None:
        raise UserError("--search: the memory of this device is not known; give --hbm_gib")
    ordered = search.candidates(config, request.models, where, request.answer)
    if not ordered:
        raise UserError(
            f"--search: no mesh of {len(where.devices)} devices divides the models' heads and the batch of "
            f"{config.rollout.batch_size}; change config.rollout.batch_size or --topology"
        )

    def compiled(candidate: Candidate) -> Peak:
        """The highest peak, or the first that is too high: then the rest is not compiled."""
        made = plan(search.changed(config, candidate.changes), request.models, where.devices)
        quickest_first = sorted(programs(made), key=lambda program: KINDS.index(program.name.split(":")[0]))
        for resident, reports in _compile(made, quickest_first, request):
            high = peak(sum(resident.values()), reports)
            if not high.fits(hbm):
                break
        step = f"a step at best {duration(candidate.seconds)}; " if candidate.seconds else ""
        needs = f"{'above ' * high.refused}{_gib(high.bytes)} in {high.program}: it {verdict(high, hbm)}"
        say(" ".join(candidate.flags(config)))
        say(f"  {step}memory estimated {_gib(candidate.peak)} GiB, compiled {needs}")
        return high

    tried = search.choose(ordered, compiled, hbm, tries)
    best, high = tried[-1]
    flags = best.flags(config) if high.fits(hbm) else None
    if flags:
        say("fits with:\n  " + " \\\n  ".join(flags))
    else:
        say("nothing that was tried fits; use more chips, or lower config.rollout.max_response_tokens or batch_size")
    rows = [asdict(one) | {"peak": asdict(high), "flags": one.flags(config)} for one, high in tried]
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


def memory_table(resident: int, reports: Sequence[Report], hbm: float | None) -> Table:
    """A row per program: what is on the chip, what it adds, and the sum: its peak."""
    rows, kinds = [], dict.fromkeys(kind for r in reports for kind in r.holds)
    for r in reports:
        p = peak(resident, [r])
        row = {"": r.name, "calls": str(r.runs), "resident": _gib(resident)}
        row |= {kind: _gib(r.holds[kind]) if r.holds.get(kind) else "" for kind in kinds}
        row |= {"outputs": "" if r.refused else _gib(r.added), "temps": _gib(r.memory["temporaries"])}
        rows.append(row | {"peak": ("> " if r.refused else "") + _gib(p.bytes), " ": verdict(p, hbm)})
    return _table(
        "Memory of a chip while each program runs, in GiB",
        rows,
        "calls: for one batch, at most. weights, cache: of the model that answers. outputs: without those that reuse "
        "the memory of a donated argument. temps: temporaries and activations; refused: the compiler stopped at this "
        "amount",
    )


def verdict(high: Peak, hbm: float | None) -> str:
    if hbm is None:
        return "?"
    if high.refused:
        return "is refused"
    return "fits" if high.fits(hbm) else f"needs {_gib(high.bytes - hbm)} more"


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


def time_table(work: dict[str, costs.Work], chip: Chip, chips: int, answer: int) -> Table:
    """The stages of a step at the chips' limits, and their sum."""

    def row(name: str, flops: float, seconds: float, limits: dict[str, float]) -> Row:
        cells = {"": name, "PFLOP": f"{flops / 1e15:.3g}" if flops else ""}
        cells |= {limit: duration(n) for limit, n in limits.items()} | {"seconds": duration(seconds)}
        mfu = f"{100 * flops / seconds / chips / chip.flops:.0f} %" if flops else ""
        return cells | {"bound by": max(limits, key=limits.__getitem__, default=""), "MFU": mfu}

    rows = [row(name, w.flops, w.seconds(chip, chips), w.limits(chip, chips)) for name, w in work.items()]
    flops, seconds = sum(w.flops for w in work.values()), sum(w.seconds(chip, chips) for w in work.values())
    return _table(
        f"Seconds of a step at {chips} {chip.name} chips' limits, answers of {answer} tokens",
        [*rows, row("step", flops, seconds, {})],
        "The mean over the branches. products, HBM, links: seconds at the peak of each; a stage takes as long as the "
        "slowest, the others overlap with it. MFU: FLOPs of the model by peak FLOPs in these seconds",
    )
