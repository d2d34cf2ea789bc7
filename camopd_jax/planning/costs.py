"""What a run costs by arithmetic: FLOPs, bytes, the seconds that the chips' limits leave, and memory, roughly.

FLOPs are counted from the model, not from the compiler: 2 per weight of a matrix product and token (twice that again in
a backward pass), and 4 x heads x head width per pair of positions in attention.
"""

import math
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from camopd_jax.method import schedule
from camopd_jax.method.optimizer import moment_names
from camopd_jax.method.setup import Setup
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.partition import ALL, trained
from camopd_jax.models.weights import table, tree_of
from camopd_jax.planning.arrays import Models
from camopd_jax.planning.topology import Chip
from camopd_jax.rollout.generate import refill_size, rings
from camopd_jax.rollout.head import tokens_at_once
from camopd_jax.runtime.mesh import batch_shards

# Forward passes that forward and backward are worth, by config.compute.remat
PASSES = {"none": 3, "dots": 3, "block": 4, "rollout": 3}


@cache
def weights(config: ModelConfig, rule: str = ALL) -> int:
    """Parameters of a model; with a rule, those that it trains (`config.optimizer.trained`)."""
    sizes = tree_of({row.path: math.prod(row.shape(config.num_layers)) for row in table(config)})
    return sum(jax.tree.leaves(trained(sizes, rule)))


@cache
def matrix_weights(config: ModelConfig) -> int:
    """Weights that a token meets in a matrix product: all kernels and the head, without the embedding's look-up."""
    kernels = (math.prod(row.shape(config.num_layers)) for row in table(config) if row.path[-1] == "kernel")
    return sum(kernels) + config.vocab_size * config.hidden_size


def forward_flops(config: ModelConfig, batch: int, start: int, end: int, logits: int) -> float:
    """Of `batch` rows, positions start..end, with logits at `logits` positions of each."""
    pairs = _sum(start + 1, end + 1)
    head = config.vocab_size * config.hidden_size
    dense = 2 * ((matrix_weights(config) - head) * (end - start) + head * logits)
    return batch * (dense + 4 * config.num_layers * config.num_heads * config.head_dim * pairs)


def cache_bytes(config: ModelConfig, item_bytes: int) -> int:
    """Keys and values of one token."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * item_bytes


def decode_bytes(config: ModelConfig, batch: int, prompt: int, answer: int, item_bytes: int) -> float:
    """The least that a batch's decode turns have to read: weights once a turn, keys and values of the tokens before."""
    cache = cache_bytes(config, item_bytes)
    return answer * matrix_weights(config) * item_bytes + batch * cache * _sum(prompt, prompt + answer)


def _sum(start: int, end: int) -> int:
    """start + (start + 1) + ... + (end - 1)."""
    return (end - start) * (start + end - 1) // 2


# ------------------------------------------------------------------------------ how often what runs


def largest(setup: Setup) -> str:
    """The branch with the most rows."""
    return max(setup.rows, key=setup.rows.__getitem__)


def lanes_of(setup: Setup, branch: str) -> int:
    """Answers in progress at one time."""
    rows = setup.rows[branch]
    return min(setup.config.rollout.concurrency or rows, rows)


def refills(setup: Setup, branch: str) -> tuple[int, int]:
    """(how often prompts that wait take free lanes, how many at one time)."""
    lanes = lanes_of(setup, branch)
    several = refill_size(lanes, batch_shards(setup.rollout_mesh))
    return math.ceil((setup.rows[branch] - lanes) / several), several


def turns(rows: int, lanes: int, answer: int) -> int:
    """Of decoding, where every answer has `answer` tokens."""
    return answer * math.ceil(rows / lanes)


def slots_read(rows: int, lanes: int, prompt: int, answer: int, cap: int) -> int:
    """Slots of the cache that one lane's turns read in all: every turn all of the ring, which grows as it fills."""
    read = done = ring = 0
    sizes = rings(cap)
    while done < answer:
        ring = next(sizes)
        read, done = read + (min(answer, ring) - done) * ring, min(answer, ring)
    return turns(rows, lanes, answer) * prompt + read + (math.ceil(rows / lanes) - 1) * answer * ring


def kept_rows(setup: Setup, branch: str) -> int:
    """Rows of which an update learns, at most: the largest gap masses reach a share of their sum within that share of
    the rows. A review before any recovery keeps all.
    """
    return math.ceil(setup.config.branches[branch].selection.mass * setup.rows[branch])


# ----------------------------------------------------------------------------- a model on a mesh


class OnMesh:
    """What one chip has of a model on a mesh, and receives in a forward pass. In bytes."""

    def __init__(self, model: ModelConfig, mesh: Mesh, dtype: str):
        self.model, self.item, self.shards = model, jnp.dtype(dtype).itemsize, batch_shards(mesh)
        self.fsdp, self.tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
        self.weights = weights(model) * self.item / (self.fsdp * self.tensor)
        self.multiplied = matrix_weights(model) * self.item / self.tensor  # weights in its products
        self.gathered = self.multiplied * (1 - 1 / self.fsdp)  # of these, what other chips send
        head = model.vocab_size * model.hidden_size
        self.layer = (matrix_weights(model) - head) / model.num_layers * self.item / self.tensor
        # A token of the batch: twice a layer, what the split heads and the split feed-forward add is summed, there and
        # back around a ring
        self.summed = 4 * model.num_layers * model.hidden_size * self.item * (1 - 1 / self.tensor) / self.shards
        # A token in the middle of a layer
        wide = 2 * (model.intermediate_size + model.num_heads * model.head_dim) / self.tensor
        self.live, self.wide = (4 * model.hidden_size + wide) * self.item, wide * self.item


# ------------------------------------------------------------------------------- seconds at the limits


@dataclass(frozen=True)
class Work:
    """What a stage of a step asks of the chips."""

    flops: float  # of the model, on all chips together
    done: float  # FLOPs with what remat computes again
    read: float  # bytes from HBM, on each chip
    received: float  # bytes from other chips, on each chip

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def limits(self, chip: Chip, chips: int) -> dict[str, float]:
        """Seconds of products, HBM and links, each at its peak."""
        received = self.received / (chip.ici_bandwidth / 2)
        return {"products": self.done / chips / chip.flops, "HBM": self.read / chip.hbm_bandwidth, "links": received}

    def seconds(self, chip: Chip, chips: int) -> float:
        """At the chip's limits: of the slowest of the three, the others being hidden behind it."""
        return max(self.limits(chip, chips).values())


def stage_work(setup: Setup, models: Models, phase: str, answer: int) -> dict[str, Work]:
    """The stages of a phase's step in which every prompt has its cap's length and every answer `answer` tokens."""
    total: dict[str, Work] = {}
    for branch in setup.config.branches if phase == schedule.MIXED else [phase]:
        stages = _rollout_work(setup, models, branch, answer) | _learning_work(setup, models, branch, answer)
        for name, work in stages.items():
            total[name] = total[name] + work if name in total else work
    read = 7 * _trained_bytes(setup, models)  # parameters, moments and gradient, and the first two back
    return total | {"update": Work(0, 0, read, 0)}


def step_seconds(setup: Setup, models: Models, answer: int, chip: Chip) -> float:
    """Of a step at the chips' limits, the mean over the phases of a cycle."""
    phases = schedule.phases(setup.config)
    stages = {phase: stage_work(setup, models, phase, answer).values() for phase in phases}
    return sum(
        often * sum(work.seconds(chip, setup.mesh.size) for work in stages[phase]) for phase, often in phases.items()
    )


def _trained_bytes(setup: Setup, models: Models) -> float:
    """Of the trained parameters, in float32, on one chip."""
    split = setup.mesh.shape["fsdp"] * setup.mesh.shape["tensor"]
    return 4 * weights(models.student, setup.config.optimizer.trained) / split


def _rollout_work(setup: Setup, models: Models, branch: str, answer: int) -> dict[str, Work]:
    """On the rollout's mesh, where weights that are split over fsdp are gathered at every turn."""
    config, prompt = setup.config, setup.config.rollout.max_prompt_tokens
    by_teacher = config.method.answers == "teacher"
    model = models.shapes[config.branches[branch].teacher] if by_teacher else models.student
    on = OnMesh(model, setup.rollout_mesh, setup.dtype)
    master = OnMesh(model, setup.mesh, setup.teacher_dtype if by_teacher else config.compute.params)
    rows, lanes = setup.rows[branch], lanes_of(setup, branch)
    stays = min(1.0, on.fsdp * on.tensor / (master.fsdp * master.tensor))  # of the copy, what lay there before
    slot = cache_bytes(model, on.item) * lanes / setup.mesh.size  # of all lanes
    begun, n = 1 + refills(setup, branch)[0], turns(rows, lanes, answer)
    prefill = forward_flops(model, rows, 0, prompt, 0)
    decode = forward_flops(model, rows, prompt, prompt + answer, answer)
    slots = slots_read(rows, lanes, prompt, answer, config.rollout.max_response_tokens)
    prefilled = begun * on.multiplied + slot * prompt, begun * on.gathered + rows * prompt * on.summed
    decoded = n * on.multiplied + slot * slots, n * on.gathered + rows * answer * on.summed
    return {
        "reshard": Work(0, 0, master.weights + on.weights, on.weights * (1 - stays)),
        "prefill": Work(prefill, prefill, *prefilled),
        "decode": Work(decode, decode, *decoded),
    }


def _learning_work(setup: Setup, models: Models, branch: str, answer: int) -> dict[str, Work]:
    """Scores and gradient: parameters split over fsdp are gathered layer by layer, once for each micro-batch."""
    config, length = setup.config, setup.config.rollout.max_prompt_tokens + answer
    rows, kept = setup.rows[branch], kept_rows(setup, branch)

    def score(model: ModelConfig) -> Work:
        on, times = OnMesh(model, setup.mesh, setup.dtype), math.ceil(rows / setup.score_batch)
        flops = forward_flops(model, rows, 0, length, answer)
        return Work(flops, flops, times * on.multiplied, times * on.gathered + rows * length * on.summed)

    student = models.student
    on, times = OnMesh(student, setup.mesh, setup.dtype), math.ceil(kept / config.optimizer.micro_batch)
    frozen = 1 - weights(student, config.optimizer.trained) / weights(student)  # have no gradient of their own
    forward, passes = forward_flops(student, kept, 0, length, answer), PASSES[config.compute.remat] - frozen
    gradient = _trained_bytes(setup, models)  # of which each chip sums its part, then meets those of other data shards
    exchanged = gradient * (on.fsdp - 1 + 2 * (1 - on.fsdp / on.shards))
    read = times * (3 * on.multiplied + 2 * gradient)
    received = times * (2 * on.gathered + exchanged) + passes * kept * length * on.summed
    scores = {} if setup.trusts_sampler else {"score student": score(student)}
    teacher = score(models.shapes[config.branches[branch].teacher])
    work = Work((3 - frozen) * forward, passes * forward, read, received)
    return scores | {"score teacher": teacher, "gradient": work}


# ------------------------------------------------------------------------------------------ memory


def memory_estimate(setup: Setup, models: Models) -> dict[str, float]:
    """Bytes on one chip from shapes: what is there through the run, "resident", and what each program adds.

    Rough in the temporaries: a layer's live activations are counted, not scheduled. Good for leaving out what cannot
    fit; the compiler has the last word.
    """
    config, gradients = setup.config, _trained_bytes(setup, models)
    moments = 2 * gradients * len(moment_names(config))
    gradients *= len(config.branches) if config.method.schedule == schedule.MIXED else 1
    teachers = [OnMesh(shape, setup.mesh, setup.teacher_dtype).weights for shape in models.shapes.values()]
    parameters = OnMesh(models.student, setup.mesh, config.compute.params).weights
    added = _rollout_memory(setup, models.student) | _learning_memory(setup, models.student, gradients)
    if not config.compute.offloads:
        return {"resident": parameters + moments + sum(teachers), **added}
    returned = {"gradient": moments if config.compute.offload == "ahead" else 0, "update": moments}
    return {"resident": parameters} | {name: n + returned.get(name, max(teachers)) for name, n in added.items()}


def _rollout_memory(setup: Setup, model: ModelConfig) -> dict[str, float]:
    on, prompt = OnMesh(model, setup.rollout_mesh, setup.dtype), setup.config.rollout.max_prompt_tokens
    branch = largest(setup)
    lanes, (times, several) = lanes_of(setup, branch), refills(setup, branch)
    copy = on.weights + (2 * on.layer if on.fsdp > 1 else 0)
    slot = (cache_bytes(model, on.item) / on.tensor + _stream(setup, on)) / on.shards  # of one lane
    filled, prefilled = slot * lanes * setup.context, (slot + on.live / on.shards) * prompt
    decode = {"decode": copy + filled * (1 + 1 / model.num_layers)}
    refill = {"refill": copy + filled + several * prefilled} if times else {}
    return {"reshard": copy, "prefill": copy + lanes * prefilled} | decode | refill


def _learning_memory(setup: Setup, model: ModelConfig, gradients: float) -> dict[str, float]:
    on, compute = OnMesh(model, setup.mesh, setup.dtype), setup.config.compute
    answer = setup.config.rollout.max_response_tokens
    head, enters = model.vocab_size * model.hidden_size / on.tensor, model.hidden_size * on.item / on.tensor
    saved = {"rollout": enters, "block": enters, "dots": enters + on.wide, "none": 4 * enters + 2 * on.wide}
    hidden = any(objective.teacher_logits for objective in setup.objectives.values()) * model.hidden_size * on.item
    waits = setup.config.rollout.batch_size / on.shards * (_stream(setup, on) * setup.context + hidden * answer)

    def of(rows: float, token: float, item: int) -> float:
        """Of so many rows of a chip, with activations of so many bytes a token."""
        logits = min(tokens_at_once(compute.logits_chunk, model.vocab_size, on.tensor), rows * answer)
        gathered = (2 * on.layer / on.item + head) * item  # weights of two layers, and the head
        return waits + rows * setup.context * token + gathered + logits * 8 * model.vocab_size / on.tensor

    micro, score = (n / on.shards for n in (setup.config.optimizer.micro_batch, setup.score_batch))
    fresh = 8 * head / on.fsdp  # gradients of embedding and head, added once they are complete
    token = model.num_layers * saved[compute.remat] + 2 * on.live
    gradient = gradients + fresh + of(micro, token, on.item + 4)
    return {"score": of(score, on.live, on.item), "gradient": gradient, "update": gradients}


def _stream(setup: Setup, on: OnMesh) -> int:
    """Bytes of a token's residual stream, where it is kept."""
    return setup.keep_residuals * (on.model.num_layers + 1) * on.model.hidden_size * on.item
