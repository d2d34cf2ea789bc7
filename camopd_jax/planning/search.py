"""Looks for flags with which a run fits its chips: by arithmetic first, then the compiler tries the best few."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from camopd_jax.config.schema import MeshConfig, TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.method.setup import Setup, check_model, resolve
from camopd_jax.planning.arrays import Models
from camopd_jax.planning.costs import memory_estimate, step_seconds
from camopd_jax.planning.peak import Peak
from camopd_jax.planning.topology import Topology
from camopd_jax.runtime.mesh import batch_shards

REMATS = ("none", "dots", "block")
MARGIN = 0.9  # a candidate must ask for this share of what failed before the compiler is asked again
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
        return self.memory["resident"] + max(n for name, n in self.memory.items() if name != "resident")

    def flags(self, config: TrainConfig) -> list[str]:
        """What to add to the command: the meshes, and of the rest what differs from the config."""
        return [
            f"--config.{name}={value}"
            for name, value in self.changes.items()
            if name in ALWAYS or value != _value(config, name)
        ]


def _value(config: TrainConfig, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def changed(config: Any, changes: Changes) -> Any:
    """A config with other values in some fields, as they are: `config.identity.changed` checks them, at length."""
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
    remats = dict.fromkeys((*REMATS, config.compute.remat))
    offloads = dict.fromkeys((config.compute.offload, "late"))
    several = []
    answering = list(_answering(config, models, topology))
    for setup, learning in _learning(config, models, topology):
        for remat, offload, (rollout_mesh, lanes) in itertools.product(remats, offloads, answering):
            if remat == "rollout" and lanes["rollout.concurrency"]:
                continue
            changes = learning | lanes | {"compute.remat": remat, "compute.offload": offload}
            tried = dataclasses.replace(setup, config=changed(config, changes), rollout_mesh=rollout_mesh)
            seconds = step_seconds(tried, models, answer, topology.chip) if topology.chip else 0.0
            several.append(Candidate(changes, memory_estimate(tried, models), seconds))
    limit = topology.hbm or math.inf

    def order(c: Candidate) -> tuple:
        if c.peak > limit:
            return True, c.peak
        return False, c.changes["compute.offload"] != config.compute.offload, c.seconds, c.peak

    return sorted(several, key=order)


def _learning(config: TrainConfig, models: Models, topology: Topology) -> Iterator[tuple[Setup, Changes]]:
    """Set-ups with every mesh, and every micro-batch on it."""
    chips, batch = len(topology.devices), config.rollout.batch_size
    for tensor, fsdp in itertools.product(_divisors(chips), repeat=2):
        setup = None
        if chips % (tensor * fsdp) == 0:
            setup = _setup(config, models, topology, (chips // (tensor * fsdp), fsdp, tensor), tensor)
        for micro_batch in _divisors(batch) if setup else ():
            if micro_batch % batch_shards(setup.mesh) == 0:
                score_batch = config.rollout.score_batch or micro_batch
                changes = {f"mesh.{axis}": size for axis, size in setup.mesh.shape.items()}
                changes |= {"optimizer.micro_batch": micro_batch}
                changes |= {"evaluation.batch_size": setup.config.evaluation.batch_size}
                yield dataclasses.replace(setup, score_batch=score_batch), changes


def _answering(config: TrainConfig, models: Models, topology: Topology) -> Iterator[tuple[Mesh, Changes]]:
    """Meshes that answer, and how many answers are in progress: all, a half, a quarter ..."""
    chips = len(topology.devices)
    for tensor in _divisors(chips):
        lanes = 0
        while setup := _setup(config, models, topology, (chips // tensor, 1, tensor), tensor, lanes):
            changes = {"rollout.mesh.data": -1, "rollout.mesh.fsdp": 1, "rollout.mesh.tensor": tensor}
            yield setup.rollout_mesh, changes | {"rollout.concurrency": lanes}
            lanes = (lanes or max(setup.rows.values())) // 2
            if not lanes:
                break


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _setup(
    config: TrainConfig, models: Models, topology: Topology, mesh: tuple[int, int, int], tensor: int, lanes: int = 0
) -> Setup | None:
    """The run on such meshes, with the least micro-batch; None where it would be refused."""
    shards = mesh[0] * mesh[1]
    changes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True)) | {
        "rollout.mesh": MeshConfig(tensor=tensor),
        "rollout.concurrency": lanes,
        "optimizer.micro_batch": shards,
        "evaluation.batch_size": -(-config.evaluation.batch_size // shards) * shards,
    }
    try:
        setup = resolve(changed(config, changes), topology.devices)
        for shape in models.shapes.values():
            check_model(shape, setup.mesh, config.compute, setup.dtype)
        return setup
    except UserError:
        return None


@dataclass(frozen=True)
class Tried:
    candidate: Candidate
    peak: Peak  # as the compiler has it


def choose(
    ordered: Sequence[Candidate], compiled: Callable[[Candidate], Peak], limit: float, tries: int
) -> tuple[Candidate | None, list[Tried]]:
    """Compiles candidates in their order until one fits, at most `tries` of them.

    After one that does not fit, those that by arithmetic ask for about as much in the program that failed are passed
    over.
    """
    tried: list[Tried] = []
    left = list(ordered)
    while left and len(tried) < tries:
        candidate = left.pop(0)
        peak = compiled(candidate)
        tried.append(Tried(candidate, peak))
        if peak.fits(limit):
            return candidate, tried
        stage = peak.program.split(":")[0]
        bar = MARGIN * _asks(candidate, stage)
        left = [c for c in left if _asks(c, stage) < bar]
    return None, tried


def _asks(candidate: Candidate, stage: str) -> float:
    return candidate.memory["resident"] + candidate.memory.get(stage, 0.0)


def shorter(config: TrainConfig, models: Models, topology: Topology) -> str:
    """Where nothing fits: how far the batch or the answers would have to be halved. Either changes the method."""
    fields = []
    for name in ("max_response_tokens", "batch_size"):
        value = getattr(config.rollout, name)
        while value > 1:
            value //= 2
            tried = changed(config, {f"rollout.{name}": value})
            best = candidates(tried, models, topology, tried.rollout.max_response_tokens)
            if best and best[0].peak <= topology.hbm:
                fields.append(f"config.rollout.{name} <= {value}")
                break
    return " or ".join(fields)
