"""Looks for flags with which a run fits its chips: by arithmetic first, then the compiler tries the best few."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from camopd_jax.config.schema import MeshConfig, TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.method.setup import Setup, check_model, resolve
from camopd_jax.planning.arrays import Models
from camopd_jax.planning.costs import memory_estimate, step_seconds
from camopd_jax.planning.peak import Peak
from camopd_jax.planning.topology import Topology
from camopd_jax.runtime.mesh import batch_shards

REMATS = ("none", "dots", "block")
MARGIN = 0.9  # a candidate must need less than this part of what failed to be compiled next
ALWAYS = ("mesh.data", "mesh.fsdp", "mesh.tensor", "rollout.mesh.tensor")  # flags that are named whatever the config

Changes = dict[str, Any]  # values of config fields, by their names


@dataclass(frozen=True)
class Candidate:
    """Flags, and what arithmetic says of them."""

    changes: Changes
    memory: dict[str, float]  # bytes on one chip: "resident", and what each program adds
    seconds: float  # of a step; 0 where no chip is known

    @property
    def peak(self) -> float:
        return self.asks(*self.memory.keys() - {"resident"})

    def asks(self, *programs: str) -> float:
        """Bytes while the largest of these programs runs."""
        return self.memory["resident"] + max(self.memory.get(name, 0.0) for name in programs)

    def flags(self, config: TrainConfig) -> list[str]:
        """What to add to the command: the meshes, and of the rest what differs from the config."""
        named = {n: v for n, v in self.changes.items() if n in ALWAYS or changed(config, {n: v}) != config}
        return [f"--config.{name}={value}" for name, value in named.items()]


def changed(config: Any, changes: Changes) -> Any:
    """A config with other values in some fields, unchecked, and so much quicker than `config.identity.changed`."""
    for name, value in changes.items():
        block, _, rest = name.partition(".")
        if rest:
            value = changed(getattr(config, block), {rest: value})
        config = dataclasses.replace(config, **{block: value})
    return config


def candidates(config: TrainConfig, models: Models, topology: Topology, answer: int) -> list[Candidate]:
    """Every choice that a run would take, the quickest of those that seem to fit first, then the others by their
    memory.

    What the config keeps on the chips goes to their hosts only in those that come after all that fit without.
    """
    chips, batch = len(topology.devices), config.rollout.batch_size
    splits = itertools.product(_divisors(chips), repeat=2)
    meshes = [(chips // (tensor * fsdp), fsdp, tensor) for tensor, fsdp in splits if chips % (tensor * fsdp) == 0]
    remats, offloads = dict.fromkeys((*REMATS, config.compute.remat)), dict.fromkeys((config.compute.offload, "late"))

    @cache
    def setup(mesh: tuple[int, int, int], tensor: int, lanes: int) -> Setup | None:
        return _setup(config, models, topology, mesh, MeshConfig(tensor=tensor), lanes)

    several = []
    halves = [0, *(batch >> k for k in range(1, batch.bit_length()))]
    for mesh, tensor, lanes in itertools.product(meshes, _divisors(chips), halves):
        learning, answering = setup(mesh, mesh[2], 0), setup((chips // tensor, 1, tensor), tensor, lanes)
        for micro, remat, offload in itertools.product(_divisors(batch), remats, offloads):
            if not (learning and answering) or micro % batch_shards(learning.mesh) or (remat == "rollout" and lanes):
                continue
            changes = dict(zip(ALWAYS, (*mesh, tensor), strict=True)) | {
                "rollout.mesh.data": -1,
                "rollout.mesh.fsdp": 1,
                "rollout.concurrency": lanes,
                "optimizer.micro_batch": micro,
                "compute.remat": remat,
                "compute.offload": offload,
                "evaluation.batch_size": learning.config.evaluation.batch_size,
            }
            score_batch = config.rollout.score_batch or micro
            tried = dataclasses.replace(learning, config=changed(config, changes), score_batch=score_batch)
            tried = dataclasses.replace(tried, rollout_mesh=answering.rollout_mesh)
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
    config: TrainConfig,
    models: Models,
    topology: Topology,
    mesh: tuple[int, int, int],
    rollout_mesh: MeshConfig,
    lanes: int,
) -> Setup | None:
    """The run on such meshes, with the least micro-batch; None where it would be refused."""
    shards = mesh[0] * mesh[1]
    changes = {"mesh": MeshConfig(*mesh), "rollout.mesh": rollout_mesh, "rollout.concurrency": lanes}
    evaluated = -(-config.evaluation.batch_size // shards) * shards
    changes |= {"optimizer.micro_batch": shards, "evaluation.batch_size": evaluated}
    try:
        setup = resolve(changed(config, changes), topology.devices)
        for shape in models.shapes.values():
            check_model(shape, setup.mesh, config.compute, setup.dtype)
        return setup
    except UserError:
        return None


def choose(
    ordered: Sequence[Candidate], compiled: Callable[[Candidate], Peak], limit: float, tries: int
) -> list[tuple[Candidate, Peak]]:
    """Compiles candidates in their order until one fits, at most `tries` of them: these, with their peaks.

    After one that does not fit, those that by arithmetic ask for about as much in the program that failed are passed
    over.
    """
    tried: list[tuple[Candidate, Peak]] = []
    left = list(ordered)
    while left and len(tried) < tries:
        one, peak = left[0], compiled(left[0])
        tried.append((one, peak))
        if peak.fits(limit):
            break
        stage = peak.program.split(":")[0]
        left = [c for c in left[1:] if c.asks(stage) < MARGIN * one.asks(stage)]
    return tried


def shorter(config: TrainConfig, models: Models, topology: Topology) -> str:
    """Where nothing fits: how far the batch or the answers would have to be halved. Either changes the method."""
    fields, limit = [], topology.hbm or math.inf
    for name in ("max_response_tokens", "batch_size"):
        value = getattr(config.rollout, name) // 2
        while value:
            tried = changed(config, {f"rollout.{name}": value})
            best = candidates(tried, models, topology, tried.rollout.max_response_tokens)
            if best and best[0].peak <= limit:
                fields.append(f"config.rollout.{name} <= {value}")
                break
            value //= 2
    return " or ".join(fields)
