"""A plan as tables for the terminal. Bytes are of one chip, in GiB."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from camopd_jax.planning.compiling import Report
from camopd_jax.planning.hlo import Counts
from camopd_jax.planning.peak import Peak, Residents, held
from camopd_jax.planning.programs import HELD
from camopd_jax.planning.search import Tried
from camopd_jax.planning.stages import Work
from camopd_jax.planning.topology import Chip, Topology

GIB = 2**30


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    view = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, name in enumerate(columns):
        view.add_column(name, justify="right" if i else "left", no_wrap=not i)
    return view


def _gib(n: float) -> str:
    return f"{n / GIB:.2f}"


def resident_table(there: Residents, cache: int) -> Table:
    view = _table("What lies on a chip through the run, in GiB", "", "GiB")
    for name, n in vars(there).items():
        view.add_row(name.replace("_", " "), _gib(n))
    view.add_row("together", _gib(there.total), style="bold")
    view.add_row("KV cache at the cap, while the student answers", _gib(cache), style="dim")
    return view


def memory_table(there: Residents, reports: Sequence[Report], peaks: Sequence[Peak], hbm: float | None) -> Table:
    """A row a program: what lies there, what it adds, and the peak: their sum."""
    some = [kind for kind in HELD if any(kind in held(r) for r in reports)]
    view = _table("Memory of a chip while each program runs, in GiB", "", "resident", *some, "outputs", "temps", "peak",
                  "", caption="weights, cache: of the answering student. outputs: beyond those in a donated argument's "
                  "place. temps: temporaries and activations; refused: the compiler gave up at these")  # fmt: skip
    peak = {p.program: p for p in peaks}
    for r in reports:
        if r.same_as:
            view.add_row(r.name, *[""] * (4 + len(some)), "as " + r.same_as, style="dim")
            continue
        lies = held(r)
        kinds = [_gib(lies[kind]) if kind in lies else "" for kind in some]
        if r.memory:
            added = [_gib(r.memory.outputs - r.memory.aliased), _gib(r.memory.temporaries)]
        else:
            added = ["", f">{_gib(r.refused_bytes or 0)}"]
        p = peak[r.name]
        high = ("" if p.exact else ">") + _gib(p.bytes)
        view.add_row(r.name, _gib(there.total), *kinds, *added, high, verdict(p, hbm))
    return view


def largest_lines(reports: Sequence[Report], least: float = 2**30) -> list[str]:
    """The largest temporaries of the programs that have big ones."""
    told = []
    for r in reports:
        if r.largest and (r.refused or (r.memory and r.memory.temporaries > least)):
            told += [f"{r.name}: the largest temporaries of a chip, each the arrays that share it in turn"]
            told += [f"  {line[:96]}" for line in r.largest[:3]]
    return told


def verdict(peak: Peak, hbm: float | None) -> str:
    if hbm is None:
        return "?"
    if not peak.exact:
        return "refused"
    return "fits" if peak.bytes <= hbm else f"{_gib(peak.bytes - hbm)} too much"


def work_table(reports: Sequence[Report], topology: Topology) -> Table:
    view = _table(
        "What the compiler says, for one chip",
        "", "compiled in", "in a step", "TFLOP", "cycles", "cost_analysis TFLOP", "and GB",
        caption="in a step: how often it runs, at most. Of one run, TFLOP: matrix products in the HLO, loops "
        "multiplied, answers at the cap. cycles: the compiler's estimates added up, loops multiplied, as seconds at "
        "the chip's clock. cost_analysis counts each loop's body once.",
    )  # fmt: skip
    for r in reports:
        if r.same_as:
            continue
        clock = topology.chip.clock if topology.chip else 0
        view.add_row(
            r.name, f"{r.seconds:.0f} s", str(r.runs), f"{r.counts.flops / 1e12:.3g}",
            duration(r.counts.cycles / clock) if clock and r.counts.cycles else "",
            "" if r.flops is None else f"{r.flops / 1e12:.3g}",
            "" if r.bytes_accessed is None else f"{r.bytes_accessed / 1e9:.3g}",
        )  # fmt: skip
    return view


def busiest_lines(reports: Sequence[Report], most: int = 2, least: float = 1e9) -> list[str]:
    """Where in the program the most bytes go between chips."""
    told = []
    for r in reports:
        top = [(n, place) for place, n in r.counts.busiest.items() if n >= least]
        for n, place in sorted(top, reverse=True)[:most]:
            kind, where = place.split(" in ", 1)
            told.append(f"{r.name}: {n / 1e9:.3g} GB by {kind} in ...{where[-50:]}")
    return told


def slowest_lines(reports: Sequence[Report], chip: Chip, least: float = 0.1) -> list[str]:
    """The loops that by the compiler's cycles take at least this share of their program."""
    told = []
    for r in reports:
        for place, cycles in sorted(r.counts.slowest.items(), key=lambda kv: -kv[1])[:2]:
            if cycles >= least * r.counts.cycles and r.counts.cycles > chip.clock:  # a second
                told.append(f"{r.name}: {duration(cycles / chip.clock)} of cycles in ...{place[-55:]}")
    return told


def collectives_table(reports: Sequence[Report]) -> Table:
    view = _table(
        "Collectives", "", "kind", "in the text", "runs", "GB of a chip",
        caption="runs and GB: of one run of the program, with every loop's trips; turns of decoding to the cap",
    )  # fmt: skip
    for r in reports:
        for i, (kind, t) in enumerate(sorted(r.counts.collectives.items(), key=lambda kv: -kv[1].bytes_run)):
            view.add_row("" if i else r.name, kind, str(t.count), str(t.runs), f"{t.bytes_run / 1e9:.3g}")
    return view


def time_table(
    work: dict[str, dict[str, Work]], topology: Topology, reports: dict[str, list[Report]], answer: int
) -> Table:
    """Stages of each phase at the chips' limits, beside what was compiled for them.

    Args:
      reports: of the programs, by "phase stage".
    """
    chip, chips = topology.chip, len(topology.devices)
    view = _table(
        f"Seconds of a step at {chips} {chip.name} chips' limits, answers of {answer} tokens, none hidden by others",
        "", "PFLOP", "seconds", "bound by", "MFU", "cycles", "links",
        caption="MFU: the model's FLOPs by the peak in those seconds. Of the programs as compiled, as often as they "
        "run, with answers at the cap and as many learnt as can be: cycles, the compiler's estimate; links, their "
        "collectives at the links' peak",
    )  # fmt: skip
    for phase, stages in work.items():
        view.add_row(phase, style="bold")
        for name, w in stages.items():
            seconds, of_stage = w.seconds(chip, chips), reports.get(f"{phase} {name}", [])
            told = [sum(r.runs * r.counts.cycles for r in of_stage) / chip.clock,
                    sum(r.runs * link_seconds(r.counts, chip) for r in of_stage)]  # fmt: skip
            view.add_row(f"  {name}", f"{w.flops / 1e15:.3g}" if w.flops else "", duration(seconds), bound(w, topology),
                         _share(w.flops, seconds, topology), *map(duration, told))  # fmt: skip
        total = sum(w.seconds(chip, chips) for w in stages.values())
        flops = sum(w.flops for w in stages.values())
        view.add_row("  step", f"{flops / 1e15:.3g}", duration(total), "", _share(flops, total, topology), "", "")
    return view


def link_seconds(counts: Counts, chip: Chip) -> float:
    """A program's collectives at the links' peak: an all-reduce goes around twice."""
    sent = sum(t.bytes_run * (2 if kind == "all-reduce" else 1) for kind, t in counts.collectives.items())
    return sent / (chip.ici_bandwidth / 2)


def bound(work: Work, topology: Topology) -> str:
    chip, chips = topology.chip, len(topology.devices)
    limits = {"products": work.done / chips / chip.flops, "HBM": work.read / chip.hbm_bandwidth,
              "links": work.received / (chip.ici_bandwidth / 2)}  # fmt: skip
    return max(limits, key=limits.get)


def _share(flops: float, seconds: float, topology: Topology) -> str:
    return "" if flops == 0 else f"{100 * flops / seconds / len(topology.devices) / topology.chip.flops:.0f} %"


def duration(seconds: float) -> str:
    if seconds == 0:
        return ""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def tried_table(tried: Sequence[Tried], topology: Topology) -> Table:
    view = _table("Search: what the compiler was asked", "data x fsdp x tensor", "rollout tensor", "places",
                  "micro batch", "remat", "offload", "step at best", "estimated", "compiled", "")  # fmt: skip
    for t in tried:
        c = t.candidate
        view.add_row(" x ".join(map(str, c.mesh)), str(c.rollout_tensor), str(c.places or "all"), str(c.micro_batch),
                     c.remat, c.offload, duration(c.seconds), _gib(c.peak),
                     ("" if t.peak.exact else "> ") + _gib(t.peak.bytes),
                     f"{t.peak.program}: {verdict(t.peak, topology.hbm)}")  # fmt: skip
    return view
