"""Searches for flags with which a run fits its chips: ordered by arithmetic; the compiler tries the first few."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from camopd_jax.config.schema import MeshConfig, TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.method.setup import Setup, check_model, resolve
from camopd_jax.planning.arrays import ModelShapes
from camopd_jax.planning.compiling import Peak
from camopd_jax.planning.costs import memory_estimate, step_seconds
from camopd_jax.planning.topology import Topology
from camopd_jax.runtime.mesh import batch_shards

REMATS = ("none", "dots", "block")
MARGIN = 0.9  # after a candidate fails, the next must by the estimate need less than this share of its memory
ALWAYS = ("mesh.data", "mesh.fsdp", "mesh.tensor", "rollout.mesh.tensor")  # flags that are always named

Changes = dict[str, Any]  # values of config fields, by their names


@dataclass(frozen=True)
class Candidate:
    """Flags, and estimates for them."""

    changes: Changes
    memory: dict[str, float]  # bytes on one chip, by program
    seconds: float  # of a step; 0 where no chip is known

    @property
    def peak(self) -> float:
        return max(self.memory.values())

    def flags(self, config: TrainConfig) -> list[str]:
        """What to add to the command: the meshes, and of the rest what differs from the config."""
        named = {n: v for n, v in self.changes.items() if n in ALWAYS or changed(config, {n: v}) != config}
        return [f"--config.{name}={value}" for name, value in named.items()]


def changed(config: Any, changes: Changes) -> Any:
    """A config with other values in some fields: unchecked, therefore much quicker than `config.identity.changed`."""
    for name, value in changes.items():
        block, _, rest = name.partition(".")
        if rest:
            value = changed(getattr(config, block), {rest: value})
        config = dataclasses.replace(config, **{block: value})
    return config


def candidates(config: TrainConfig, models: ModelShapes, topology: Topology, answer: int) -> list[Candidate]:
    """Every valid choice: first those that by the estimate fit, the quickest first, then the others by their memory.

    Those that move arrays to host memory, if the config does not, come after all others that fit.
    """
    chips, prompts, answers = len(topology.devices), config.rollout.batch_size, config.rollout.answers_per_prompt
    batch = prompts * answers
    remats, offloads = dict.fromkeys((*REMATS, config.compute.remat)), dict.fromkeys((config.compute.offload, "late"))
    lanes = [0, *((prompts >> k) * answers for k in range(1, prompts.bit_length()))]
    several = []
    experts = _divisors(chips) if models.student.routing else [1]
    for fsdp, tensor, answering, expert in itertools.product(*[_divisors(chips)] * 3, experts):
        split = fsdp * tensor * expert
        sizes = (chips // split, fsdp, tensor, answering)
        setup = _setup(config, models, topology, sizes, expert) if chips % split == 0 else None
        if setup is None:
            continue
        for micro, n, remat, offload in itertools.product(_divisors(batch), lanes, remats, offloads):
            if (
                micro % batch_shards(setup.mesh)
                or n % (answers * batch_shards(setup.rollout_mesh))
                or (remat == "rollout" and n)
            ):
                continue
            changes = dict(zip(ALWAYS, sizes, strict=True)) | {
                "mesh.expert": expert,
                "rollout.mesh.expert": 0,
                "rollout.mesh.data": -1,
                "rollout.mesh.fsdp": 1,
                "rollout.concurrency": n,
                "optimizer.micro_batch": micro,
                "compute.remat": remat,
                "compute.offload": offload,
                "evaluation.batch_size": setup.config.evaluation.batch_size,
            }
            tried = dataclasses.replace(setup, config=changed(config, changes))
            seconds = step_seconds(tried, models, answer, topology.chip) if topology.chip else 0.0
            several.append(Candidate(changes, memory_estimate(tried, models), seconds))

    def order(c: Candidate) -> tuple[Any, ...]:
        if c.peak > (topology.hbm or math.inf):
            return True, c.peak
        return False, c.changes["compute.offload"] != config.compute.offload, c.seconds, c.peak

    return sorted(several, key=order)


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _setup(
    config: TrainConfig, models: ModelShapes, topology: Topology, sizes: tuple[int, ...], expert: int
) -> Setup | None:
    """The run on meshes of such sizes (`ALWAYS`, and for experts), with the smallest micro-batch; None if the run
    refuses them.
    """
    data, fsdp, tensor, answering = sizes
    shards = data * fsdp
    evaluated = -(-config.evaluation.batch_size // shards) * shards
    changes: Changes = {
        "mesh": MeshConfig(data, fsdp, tensor, expert),
        "rollout.mesh": MeshConfig(tensor=answering, expert=0),
    }
    changes |= {"rollout.concurrency": 0}
    changes |= {"optimizer.micro_batch": shards, "evaluation.batch_size": evaluated}
    try:
        setup = resolve(changed(config, changes), topology.devices)
        for shape, made in itertools.product(models.shapes.values(), (setup.mesh, setup.rollout_mesh)):
            check_model(shape, made, config.compute, setup.dtype)
        return setup
    except UserError:
        return None


def choose(
    ordered: Sequence[Candidate], compiled: Callable[[Candidate], Peak], limit: float, tries: int
) -> list[tuple[Candidate, Peak]]:
    """Compiles candidates in their order until one fits, at most `tries`: those that were compiled, with their peaks.

    After one that does not fit, all others that by the estimate need about as much in the program that failed are
    skipped.
    """
    tried: list[tuple[Candidate, Peak]] = []
    left = list(ordered)
    while left and len(tried) < tries:
        one, peak = left[0], compiled(left[0])
        tried.append((one, peak))
        if peak.fits(limit):
            break
        stage = peak.program.split(":")[0]
        left = [c for c in left[1:] if c.memory.get(stage, c.peak) < MARGIN * one.memory.get(stage, one.peak)]
    return tried
