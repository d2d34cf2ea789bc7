"""Looks for flags with which a run fits its chips: by arithmetic first, then the compiler tries the best few."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from camopd_jax.config.schema import TrainConfig
from camopd_jax.method import loop
from camopd_jax.models.config import ModelConfig
from camopd_jax.planning.arrays import Models
from camopd_jax.planning.costs import memory_estimate
from camopd_jax.planning.peak import Peak
from camopd_jax.planning.stages import phase_shares, stage_work
from camopd_jax.planning.topology import Topology

REMATS = ("none", "dots", "block")
MARGIN = 0.9  # a candidate must ask for this share of what failed before the compiler is asked again


@dataclass(frozen=True)
class Candidate:
    """Flags, and what arithmetic says of them."""

    mesh: tuple[int, int, int]  # data, fsdp, tensor
    rollout_tensor: int  # of the mesh that answers are made on; the rest of it is data
    places: int  # answered at one time; 0: the whole batch
    micro_batch: int
    remat: str
    offload: str
    evaluation_batch: int
    memory: dict[str, float]  # bytes on one chip: "resident", and by program
    seconds: float  # of a step

    @property
    def peak(self) -> float:
        return self.memory["resident"] + max(n for name, n in self.memory.items() if name != "resident")

    def applied(self, config: TrainConfig) -> TrainConfig:
        data, fsdp, tensor = self.mesh
        return dataclasses.replace(
            config,
            mesh=dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor),
            rollout=dataclasses.replace(
                config.rollout,
                mesh=dataclasses.replace(config.rollout.mesh, data=-1, fsdp=1, tensor=self.rollout_tensor),
                places=self.places,
            ),
            optimizer=dataclasses.replace(config.optimizer, micro_batch=self.micro_batch),
            compute=dataclasses.replace(config.compute, remat=self.remat, offload=self.offload),
            evaluation=dataclasses.replace(config.evaluation, batch_size=self.evaluation_batch),
        )

    def flags(self, config: TrainConfig) -> list[str]:
        """What to add to the command: the meshes, and of the rest what differs from the config."""
        data, fsdp, tensor = self.mesh
        given = [f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}",
                 f"--config.rollout.mesh.tensor={self.rollout_tensor}"]  # fmt: skip
        others = {
            "rollout.mesh.data": (-1, config.rollout.mesh.data),
            "rollout.mesh.fsdp": (1, config.rollout.mesh.fsdp),
            "rollout.places": (self.places, config.rollout.places),
            "optimizer.micro_batch": (self.micro_batch, config.optimizer.micro_batch),
            "compute.remat": (self.remat, config.compute.remat),
            "compute.offload": (self.offload, config.compute.offload),
            "evaluation.batch_size": (self.evaluation_batch, config.evaluation.batch_size),
        }
        return given + [f"--config.{name}={new}" for name, (new, old) in others.items() if new != old]


def meshes(chips: int, models: Sequence[ModelConfig]) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) of so many chips that divide what they split of every model."""
    for tensor, fsdp in itertools.product(range(1, chips + 1), repeat=2):
        split = [n for m in models for n in (m.num_heads, m.num_kv_heads, m.vocab_size, m.intermediate_size)]
        if chips % (tensor * fsdp) or any(n % tensor for n in split) or any(m.hidden_size % fsdp for m in models):
            continue
        yield chips // (tensor * fsdp), fsdp, tensor


def candidates(config: TrainConfig, models: Models, topology: Topology, answer: int) -> list[Candidate]:
    """Every choice that divides, the quickest of those that seem to fit first, then the others by their memory.

    What the config keeps on the chips goes to their hosts only in those that come after all that fit without.
    """
    shapes, chips = (models.general, models.specialised), len(topology.devices)
    rows, found = tuple(loop.batch_rows(config).values()), []
    offloads = dict.fromkeys((config.compute.offload, "late"))
    remats = dict.fromkeys((*REMATS, config.compute.remat))
    tensors = sorted({tensor for _, _, tensor in meshes(chips, shapes)})
    for mesh in meshes(chips, shapes):
        shards = mesh[0] * mesh[1]
        if any(n % shards for n in (*rows, config.rollout.score_batch)):
            continue
        evaluation = math.ceil(config.evaluation.batch_size / shards) * shards
        micros = [n for n in range(shards, config.rollout.batch_size + 1, shards) if config.rollout.batch_size % n == 0]
        answering = [(tensor, places) for tensor in tensors for places in _places(rows, chips // tensor)]
        for micro_batch, remat, offload, (tensor, places) in itertools.product(micros, remats, offloads, answering):
            if remat == "rollout" and places:
                continue
            one = Candidate(mesh, tensor, places, micro_batch, remat, offload, evaluation, {}, 0.0)
            found.append(_estimated(one, config, models, topology, answer))
    limit = topology.hbm or math.inf

    def order(c: Candidate) -> tuple:
        if c.peak > limit:
            return True, c.peak
        return False, c.offload != config.compute.offload, c.seconds, c.peak

    return sorted(found, key=order)


def _places(rows: tuple[int, ...], shards: int) -> Iterator[int]:
    """How many of a batch to answer at one time: all of them (0), a half, a quarter ... that divides the mesh."""
    if all(n % shards == 0 for n in rows):
        yield 0
        places = max(rows) // 2
        while places and places % shards == 0:
            yield places
            places //= 2


def _estimated(one: Candidate, config: TrainConfig, models: Models, topology: Topology, answer: int) -> Candidate:
    tried = one.applied(config)
    mesh = dict(zip(("data", "fsdp", "tensor"), one.mesh, strict=True))
    memory = memory_estimate(tried, models.general, models.specialised, mesh, topology.platform)
    seconds = 0.0
    if topology.chip:
        for phase, share in phase_shares(tried).items():
            work = stage_work(tried, models.specialised, mesh, topology.platform, phase, answer)
            seconds += share * sum(w.seconds(topology.chip, len(topology.devices)) for w in work.values())
    return dataclasses.replace(one, memory=memory, seconds=seconds)


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
        if peak.exact and peak.bytes <= limit:
            return candidate, tried
        stage = peak.program.split(":")[0]
        bar = MARGIN * _asked(candidate, stage)
        left = [c for c in left if _asked(c, stage) < bar]
    return None, tried


def _asked(candidate: Candidate, stage: str) -> float:
    return candidate.memory["resident"] + candidate.memory.get(stage, 0.0)


def shorter(config: TrainConfig, models: Models, topology: Topology) -> str:
    """Where nothing fits: how far the batch or the answers would have to be halved. Either changes the method."""
    told = []
    for name in ("max_response_tokens", "batch_size"):
        value = getattr(config.rollout, name)
        while value > 1:
            value //= 2
            rollout = dataclasses.replace(config.rollout, **{name: value})
            tried = dataclasses.replace(config, rollout=rollout)
            best = candidates(tried, models, topology, rollout.max_response_tokens)
            if best and best[0].peak <= topology.hbm:
                told.append(f"config.rollout.{name} <= {value}")
                break
    return " or ".join(told)
