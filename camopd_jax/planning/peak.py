"""What a chip holds at most over a whole run, program by program."""

from collections.abc import Sequence
from dataclasses import dataclass

from camopd_jax.method import schedule
from camopd_jax.planning.arrays import Plan, chip_bytes
from camopd_jax.planning.compiling import Report
from camopd_jax.planning.programs import Program


@dataclass(frozen=True)
class Peak:
    """While one program runs."""

    program: str
    bytes: float
    exact: bool  # False: the compiler refused, and named only a part of what it needs

    def fits(self, hbm: float) -> bool:
        return self.exact and self.bytes <= hbm


def residents(plan: Plan, programs: Sequence[Program], reports: Sequence[Report]) -> dict[str, int]:
    """Bytes on one chip that are there through the whole run: the student, what trains it, teachers, answers of the
    step before (which the host still reads) and of this one, and the code of all compiled programs.
    """
    config, state = plan.setup.config, plan.state
    offloads = config.compute.offload != "off"
    mixed = config.method.schedule == schedule.MIXED
    acting = list(config.branches) if mixed else list(schedule.phases(config))
    waiting = {config.branches[branch].teacher for branch in acting} if offloads else set()
    teachers = {
        _field(plan, name): 0 if name in waiting else chip_bytes(params)
        for name, (_, params) in plan.teachers.items()
    }
    batches = (program.args[-1] for program in programs if program.name.startswith("update"))
    return {
        "parameters": chip_bytes(plan.params),
        "optimizer": 0 if offloads else chip_bytes((state.moments, state.step, state.skipped)),
        **teachers,
        "answers": 2 * max(map(chip_bytes, batches)),
        "code": sum(report.memory.code for report in reports if report.memory and not report.same_as),
    }


def _field(plan: Plan, teacher: str) -> str:
    """What tables call a teacher; one that is named by a path, by its first branch."""
    if teacher in ("general", "specialised"):
        return f"{teacher}_teacher"
    return "teacher_of_" + next(name for name, of in plan.setup.config.branches.items() if of.teacher == teacher)


def peaks(resident: int, reports: Sequence[Report]) -> list[Peak]:
    """Residents, what else lies there while each program runs, and what it needs beside its arguments."""
    found = []
    for report in reports:
        held, memory = resident + sum(report.holds.values()), report.memory
        needed = memory.outputs - memory.aliased + memory.temporaries if memory else report.refused_bytes
        found.append(Peak(report.name, held + needed, memory is not None))
    return found


def worst(several: Sequence[Peak]) -> Peak:
    """The highest; of those the compiler refused, one that is known to be too much counts before any other."""
    return max(several, key=lambda peak: (not peak.exact, peak.bytes))
