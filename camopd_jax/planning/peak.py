"""What a chip holds at most over a whole run, program by program, and whether that fits."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from camopd_jax.planning.arrays import Plan, chip_bytes
from camopd_jax.planning.compiling import Report
from camopd_jax.planning.costs import cache_bytes
from camopd_jax.planning.programs import HELD
from camopd_jax.runtime.mesh import batch_shards


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
    state, offload = plan.state, plan.config.compute.offload != "off"
    return Residents(
        parameters=chip_bytes(state.params),
        optimizer=0 if offload else chip_bytes((state.moments, state.step, state.skipped)),
        general_teacher=0 if offload else chip_bytes(plan.teachers["general"][1]),
        specialised_teacher=0 if offload else chip_bytes(plan.teachers["specialised"][1]),
        answers=2 * chip_bytes(plan.batch),
        code=sum(report.memory.code for report in reports if report.memory),
    )


def held(report: Report) -> dict[str, int]:
    """Bytes on one chip of what lies there for a part of a step, by kind, while this program runs."""
    found = {kind: report.arguments.get(kind, 0) + report.beside.get(kind, 0) for kind in HELD}
    return {kind: n for kind, n in found.items() if n}


def peaks(there: Residents, reports: Sequence[Report]) -> list[Peak]:
    """Residents, what else lies there while each program runs, and what it needs beside its arguments."""
    found = []
    for report in reports:
        lies = there.total + sum(held(report).values())
        if report.memory:
            needed = report.memory.outputs - report.memory.aliased + report.memory.temporaries
            found.append(Peak(report.name, lies + needed, True))
        elif report.refused:
            found.append(Peak(report.name, lies + (report.refused_bytes or 0), False))
    return found


def worst(found: Sequence[Peak]) -> Peak:
    """The highest; of those the compiler refused, one that is known to be too much counts before any other."""
    return max(found, key=lambda peak: (not peak.exact, peak.bytes))


def kv_cache(plan: Plan) -> int:
    """Bytes of the whole cache on one chip, at the answers' cap."""
    item, mesh = jnp.dtype(plan.student.dtype).itemsize, plan.rollout_mesh
    places = plan.places // batch_shards(mesh)
    return cache_bytes(plan.student.config, item) * plan.slots * places // mesh.shape["tensor"]
