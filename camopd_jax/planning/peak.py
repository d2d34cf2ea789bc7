"""What a chip holds at most over a whole run, program by program, and whether that fits."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from camopd_jax.planning.compiling import Report
from camopd_jax.planning.costs import cache_bytes
from camopd_jax.planning.programs import Plan, chip_bytes

RESIDENT = ("parameters", "optimizer", "teacher")  # kinds of arguments that lie on the chips all the time


@dataclass(frozen=True)
class Residents:
    """Bytes on one chip that are there through the whole run."""

    parameters: int
    optimizer: int
    general_teacher: int
    specialised_teacher: int
    answers: int  # of the step before, which the host still reads; and as many of this one
    code: int  # of all compiled programs

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Peak:
    """While one program runs."""

    program: str
    bytes: float
    exact: bool  # False: the compiler refused, and told only a part of what it needs


def residents(plan: Plan, reports: Sequence[Report]) -> Residents:
    state = plan.state
    return Residents(
        parameters=chip_bytes(state.params),
        optimizer=chip_bytes((state.moments, state.step, state.skipped)),
        general_teacher=chip_bytes(plan.teachers["general"][1]),
        specialised_teacher=chip_bytes(plan.teachers["specialised"][1]),
        answers=2 * chip_bytes(plan.batch),
        code=sum(report.memory.code for report in reports if report.memory),
    )


def peaks(there: Residents, reports: Sequence[Report]) -> list[Peak]:
    """Residents, and what each program needs beside them."""
    found = []
    for report in reports:
        if report.memory:
            needed = report.memory.outputs - report.memory.aliased + report.memory.temporaries
            found.append(Peak(report.name, there.total + needed, True))
        elif report.refused:
            found.append(Peak(report.name, there.total + (report.refused_bytes or 0), False))
    return found


def worst(found: Sequence[Peak]) -> Peak:
    """The highest; of those the compiler refused, one that is known to be too much counts before any other."""
    return max(found, key=lambda peak: (not peak.exact, peak.bytes))


def kv_cache(plan: Plan) -> int:
    """Bytes of the whole cache on one chip, at the answers' cap. While it grows, half as much lies beside it."""
    slots = plan.prompt_slots + plan.config.rollout.max_response_tokens
    item = jnp.dtype(plan.student.dtype).itemsize
    return cache_bytes(plan.student.config, item) * slots * (plan.rows // plan.shards) // plan.mesh.shape["tensor"]
