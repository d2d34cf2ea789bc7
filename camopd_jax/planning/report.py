"""A plan: compiles the programs of a run, prints what they need, and looks for flags that fit."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from camopd_jax.config.schema import TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.inference import loading
from camopd_jax.method import loop
from camopd_jax.models import hf
from camopd_jax.models.config import from_hf
from camopd_jax.models.shapes import SHAPES
from camopd_jax.planning import peak, search, table
from camopd_jax.planning.arrays import Models, Plan, plan
from camopd_jax.planning.compiling import Report, compile_program
from camopd_jax.planning.peak import Peak
from camopd_jax.planning.programs import programs
from camopd_jax.planning.search import Candidate
from camopd_jax.planning.stages import phase_shares, stage_work
from camopd_jax.planning.topology import Topology
from camopd_jax.runtime import cli

Wanted = tuple[str, ...]  # beginnings of programs' names

CONSOLE = cli.console()


KINDS = ["reshard", "prefill", "refill", "grow", "decode", "score", "select", "gradient", "update"]
# For most memory; the quick ones first. No review asks for more than a recovery.
SEARCHED = ("reshard", "score", "gradient", "update: mixed", "update: recovery", "prefill", "refill", "decode")


def read_models(config: TrainConfig, general: str | None, specialised: str | None) -> Models:
    """The two models' shapes; files, folders or names of shapes stand in for what the config names."""
    context = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    given = {
        "general": _config_json(general, "--general_config", config.general_model, "config.general_model"),
        "specialised": _config_json(
            specialised, "--specialised_config", config.specialised_model, "config.specialised_model"
        ),
    }
    shapes = {name: from_hf(values, context=context, where=name) for name, values in given.items()}
    eos = given["specialised"].get("eos_token_id")
    return Models(**shapes, eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))


def _config_json(instead: str | None, flag: str, name: str, field: str) -> dict[str, Any]:
    if instead in SHAPES:
        return SHAPES[instead]
    if instead and Path(instead).expanduser().exists():
        return hf.read_config(Path(instead).expanduser())
    if instead:
        raise UserError(f"{flag}: {instead} is no file or folder, and no shape; the shapes are {', '.join(SHAPES)}")
    return hf.read_config(loading.find(name, field, files=("config.json",)))


def compile_all(config: TrainConfig, models: Models, where: Topology, wanted: Wanted) -> tuple[Plan, list[Report]]:
    """The run's arrays, and a report of each of its programs, or of those whose name begins with a wanted word."""
    made = plan(config, models, where.devices, where.platform)
    return made, list(_compile(made, models, where, wanted))


def _compile(made: Plan, models: Models, where: Topology, wanted: Wanted) -> Iterator[Report]:
    """In the order of `wanted`.

    Raises:
      UserError: if the run has none of these.
    """
    found = list(programs(made, models.eos_ids))
    chosen = [program for word in wanted for program in found if program.name.startswith(word)]
    if not chosen:
        raise UserError(f"--programs={','.join(wanted)}: the run has none; give some of {', '.join(KINDS)}")
    for program in chosen:
        with CONSOLE.status(f"{program.name} …"):
            yield compile_program(program, made, where)


def report(config: TrainConfig, models: Models, where: Topology, answer: int, wanted: Wanted) -> dict[str, Any]:
    """Compiles, prints the tables, and returns all of it for the JSON file."""
    made, reports = compile_all(config, models, where, wanted)
    there = peak.residents(made, reports)
    peaks = peak.peaks(there, reports)
    say = CONSOLE.print
    mesh = dict(made.mesh.shape)
    sizes = " x ".join(f"{axis} {n}" for axis, n in mesh.items())
    answering = " x ".join(map(str, made.rollout_mesh.shape.values()))
    slots = f"{made.prompt_slots} + {config.rollout.max_response_tokens} slots"
    say(f"{where.name}: {len(where.devices)} devices, mesh {sizes}; {made.rows} rows of {slots}, {made.student.dtype}")
    scored, learnt = loop.score_batch(config), config.optimizer.micro_batch
    say(f"answers on {answering}, {made.places} at a time; scores of {scored}, gradients of {learnt}")
    say()
    say(table.resident_table(there, peak.kv_cache(made)))
    say(table.memory_table(there, reports, peaks, where.hbm))
    high = peak.worst(peaks)
    say(_fit_line(high, where) + "\n")
    for line in table.largest_lines(reports):
        say(line)
    say(table.work_table(reports, where))
    for line in table.slowest_lines(reports, where.chip) if where.chip else ():
        say(line)
    say(table.collectives_table(reports))
    for line in table.busiest_lines(reports):
        say(line)
    for r in reports:
        for finding in r.findings:
            say(f"{r.name}: {finding}")
    told: dict[str, Any] = {
        "topology": where.name, "devices": len(where.devices), "hbm": where.hbm, "mesh": mesh,
        "residents": vars(there), "kv_cache": peak.kv_cache(made), "peaks": [vars(p) for p in peaks],
        "fits": where.hbm and high.exact and high.bytes <= where.hbm,
        "programs": [dataclasses.asdict(r) for r in reports],
    }  # fmt: skip
    return told | (times(config, models, where, mesh, reports, answer) if where.chip else {})


def _fit_line(high: Peak, where: Topology) -> str:
    at = f"The peak is {'' if high.exact else 'above '}{high.bytes / table.GIB:.2f} GiB, in {high.program}"
    if where.hbm is None:
        return f"{at}; this device does not say how much it has (--hbm_gib)"
    fits = high.exact and high.bytes <= where.hbm
    return f"{at}, of {where.hbm / table.GIB:.2f} GiB: it {'fits' if fits else 'does not fit'}"


def times(
    config: TrainConfig, models: Models, where: Topology, mesh: dict[str, int], reports: list[Report], answer: int
) -> dict[str, Any]:
    """Seconds of a step and of the run, decoding against its limit."""
    chip, chips = where.chip, len(where.devices)
    shares = phase_shares(config)
    work = {phase: stage_work(config, models.specialised, mesh, where.platform, phase, answer) for phase in shares}
    by_name = {r.name: r for r in reports}
    compiled = {f"{phase} {stage}": _of_stage(by_name, phase, stage) for phase in shares for stage in work[phase]}
    CONSOLE.print(table.time_table(work, where, compiled, answer))
    step = sum(shares[p] * sum(w.seconds(chip, chips) for w in stages.values()) for p, stages in work.items())
    rows = sum(loop.batch_rows(config)[name] for name in loop.ACTING[next(iter(shares))])
    decode = work[next(iter(shares))]["decode"]
    rate = rows * answer / decode.seconds(chip, chips)
    CONSOLE.print(
        f"a step at best {table.duration(step)}, the run's {config.steps} steps {table.duration(step * config.steps)}, "
        f"without evaluations\ndecoding: at best {rate:.4g} tokens/s of all chips"
    )
    return {
        "answer_tokens": answer, "step_seconds": step, "run_seconds": step * config.steps,
        "decode_tokens_per_second": rate,
        "compiler_seconds": {r.name: r.runs * r.counts.cycles / chip.clock for r in reports if not r.same_as},
        "work": {phase: {name: vars(w) for name, w in stages.items()} for phase, stages in work.items()},
    }  # fmt: skip


def _of_stage(reports: dict[str, Report], phase: str, stage: str) -> list[Report]:
    """What was compiled for a stage; of two teachers' programs of the same shapes, the first."""
    names = {
        "prefill": ["prefill", "refill"], "score student": ["score: student"], "update": [f"update: {phase}"],
        "score teacher": {"recovery": ["score: general teacher"], "review": ["score: specialised teacher"]}.get(
            phase, ["score: general teacher", "score: specialised teacher"]),
    }.get(stage, [stage])  # fmt: skip
    found = [reports[name] for name in names if name in reports]
    return [dataclasses.replace(reports[r.same_as], runs=r.runs) if r.same_as else r for r in found]


def look_for(
    config: TrainConfig, models: Models, where: Topology, answer: int, tries: int, wanted: Wanted
) -> dict[str, Any]:
    """The search: prints what was tried and ends in flags."""
    if where.hbm is None:
        raise UserError("--search needs to know a device's memory; give --hbm_gib")
    ordered = search.candidates(config, models, where, answer)
    if not ordered:
        raise UserError(
            f"--search: no mesh of {len(where.devices)} devices divides the models' heads and the batch of "
            f"{config.rollout.batch_size}; change config.rollout.batch_size or --topology"
        )

    def compiled(candidate: Candidate) -> Peak:
        """The highest peak, or the first that is too high: the compiler need not be asked for the rest."""
        made = plan(candidate.applied(config), models, where.devices, where.platform)
        words = tuple(word for word in SEARCHED if word.startswith(wanted)) or wanted
        reports: list[Report] = []
        for one in _compile(made, models, where, words):
            reports.append(one)
            high = peak.worst(peak.peaks(peak.residents(made, reports), reports))
            if not high.exact or high.bytes > where.hbm:
                break
        return high

    found, tried = search.choose(ordered, compiled, where.hbm, tries)
    CONSOLE.print(table.tried_table(tried, where))
    if found:
        CONSOLE.print("fits with:\n  " + " \\\n  ".join(found.flags(config)))
    else:
        less = search.shorter(config, models, where)
        CONSOLE.print(
            "nothing that was tried fits." + (f" By arithmetic {less} would; it changes the run" if less else "")
        )
    return {
        "search": [
            dataclasses.asdict(t.candidate) | {"peak": vars(t.peak), "flags": t.candidate.flags(config)} for t in tried
        ],
        "recommended": found and found.flags(config),
        "candidates": len(ordered),
    }
