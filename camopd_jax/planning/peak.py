"""What a chip holds at most over a whole run, program by program."""

from collections.abc import Sequence
from dataclasses import dataclass

from camopd_jax.method import schedule
from camopd_jax.method.branches import teacher_names
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
    """Bytes on one chip through the whole run: the student and what trains it, teachers, answers of the step before
    (which the host still reads) and of this one, and the code of all compiled programs.
    """
    config, state, waiting = plan.setup.config, plan.state, set()
    if config.compute.offloads:
        phases = schedule.phases(config)
        waiting = {of.teacher for name, of in config.branches.items() if name in phases or schedule.MIXED in phases}
    optimizer = () if config.compute.offloads else (state.moments, state.step)
    teachers = {name: chip_bytes(() if name in waiting else params) for name, (_, params) in plan.teachers.items()}
    batches = (program.args[-1] for program in programs if program.name.startswith("update"))
    return {
        "parameters": chip_bytes(plan.params),
        "optimizer": chip_bytes(optimizer),
        **{_field(plan, name): n for name, n in teachers.items()},
        "answers": 2 * max(map(chip_bytes, batches)),
        "code": sum(report.memory["code"] for report in reports if report.memory and not report.same_as),
    }


def _field(plan: Plan, teacher: str) -> str:
    """What tables call a teacher; one that is named by a path, by its first branch."""
    if teacher in ("general", "specialised"):
        return f"{teacher}_teacher"
    return "teacher_of_" + teacher_names(plan.setup.config)[teacher].split(".")[2]


def peaks(resident: int, reports: Sequence[Report]) -> list[Peak]:
    """What is on the chip through the run, what each program holds, and what it needs beside its arguments."""
    return [
        Peak(r.name, resident + sum(r.holds.values()) + r.added + r.temporaries, r.memory is not None) for r in reports
    ]


def worst(several: Sequence[Peak]) -> Peak:
    """The highest; of those the compiler refused, one that is known to be too much counts before any other."""
    return max(several, key=lambda peak: (not peak.exact, peak.bytes))
