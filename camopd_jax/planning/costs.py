"""What a run costs by arithmetic: FLOPs, bytes, the seconds that the chips' limits leave, and memory, roughly.

FLOPs are counted from the model, not from the compiler: 2 per weight of a matrix product and token (twice that again in
a backward pass), and 4 x heads x head width per pair of positions in attention.
"""

import math
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

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


# ------------------------------------------------------------------------------------- how often what runs


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
    read = done = 0
    for ring in rings(cap):
        read += (min(answer, ring) - done) * ring
        done = min(answer, ring)
        if done == answer:
            break
    later = (math.ceil(rows / lanes) - 1) * answer * ring
    return turns(rows, lanes, answer) * prompt + read + later


def kept_rows(setup: Setup, branch: str) -> int:
    """Rows of which an update learns, at most: the largest gap masses reach a share of their sum within that share of
    the rows. A review before any recovery keeps all.
    """
    return math.ceil(setup.config.branches[branch].selection.mass * setup.rows[branch])


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
        return {
            "products": self.done / chips / chip.flops,
            "HBM": self.read / chip.hbm_bandwidth,
            "links": self.received / (chip.ici_bandwidth / 2),
        }

    def seconds(self, chip: Chip, chips: int) -> float:
        """At the chip's limits: of the slowest of the three, the others being hidden behind it."""
        return max(self.limits(chip, chips).values())


def stage_work(setup: Setup, models: Models, phase: str, answer: int) -> dict[str, Work]:
    """The stages of a phase's step in which every prompt has its cap's length and every answer `answer` tokens."""
    total: dict[str, Work] = {}
    for branch in setup.config.branches if phase == schedule.MIXED else [phase]:
        for part in (_rollout_work, _learning_work):
            for name, work in part(setup, models, branch, answer).items():
                total[name] = total[name] + work if name in total else work
    split = setup.mesh.shape["fsdp"] * setup.mesh.shape["tensor"]
    state = weights(models.student, setup.config.optimizer.trained) / split * 4
    return total | {"update": Work(0, 0, 7 * state, 0)}  # parameters, moments and gradient, and the first two back


def step_seconds(setup: Setup, models: Models, answer: int, chip: Chip) -> float:
    """Of a step at the chips' limits, the mean over the phases of a cycle."""
    stages = {phase: stage_work(setup, models, phase, answer) for phase in schedule.phases(setup.config)}
    return sum(
        share * work.seconds(chip, setup.mesh.size)
        for phase, share in schedule.phases(setup.config).items()
        for work in stages[phase].values()
    )


def _rollout_work(setup: Setup, models: Models, branch: str, answer: int) -> dict[str, Work]:
    """On the rollout's mesh, where weights that are split over fsdp are gathered at every turn."""
    config, item, prompt = setup.config, jnp.dtype(setup.dtype).itemsize, setup.config.rollout.max_prompt_tokens
    by_teacher = config.method.answers == "teacher"
    model = models.shapes[config.branches[branch].teacher] if by_teacher else models.student
    kind = setup.teacher_dtype if by_teacher else config.compute.params
    rows, lanes, shards = setup.rows[branch], lanes_of(setup, branch), batch_shards(setup.rollout_mesh)
    fsdp, tensor = setup.rollout_mesh.shape["fsdp"], setup.rollout_mesh.shape["tensor"]
    split = setup.mesh.shape["fsdp"] * setup.mesh.shape["tensor"]
    multiplied = matrix_weights(model) * item / tensor  # of the weights, by one chip
    gathered = multiplied * (fsdp - 1) / fsdp
    copy, master = weights(model) * item / (fsdp * tensor), weights(model) * jnp.dtype(kind).itemsize / split
    kept_here = min(1.0, fsdp * tensor / split)  # of the copy, what lay there before
    slot = cache_bytes(model, item) / tensor * lanes / shards  # of all lanes of a chip
    begun = 1 + refills(setup, branch)[0]
    token = _reduced(model, item, tensor) / shards
    prefill = forward_flops(model, rows, 0, prompt, 0)
    decode = forward_flops(model, rows, prompt, prompt + answer, answer)
    n = turns(rows, lanes, answer)
    slots = slots_read(rows, lanes, prompt, answer, config.rollout.max_response_tokens)
    return {
        "reshard": Work(0, 0, master + copy, copy * (1 - kept_here)),
        "prefill": Work(prefill, prefill, begun * multiplied + slot * prompt, begun * gathered + rows * prompt * token),
        "decode": Work(decode, decode, n * multiplied + slot * slots, n * gathered + rows * answer * token),
    }


def _learning_work(setup: Setup, models: Models, branch: str, answer: int) -> dict[str, Work]:
    """Scores and gradient: parameters split over fsdp are gathered layer by layer, once for each micro-batch."""
    config, item = setup.config, jnp.dtype(setup.dtype).itemsize
    fsdp, tensor = setup.mesh.shape["fsdp"], setup.mesh.shape["tensor"]
    length, rows, kept = config.rollout.max_prompt_tokens + answer, setup.rows[branch], kept_rows(setup, branch)

    def multiplied(model: ModelConfig) -> float:
        return matrix_weights(model) * item / tensor

    def gathered(model: ModelConfig) -> float:
        return multiplied(model) * (fsdp - 1) / fsdp

    def token(model: ModelConfig) -> float:
        return _reduced(model, item, tensor) / batch_shards(setup.mesh)

    def score(model: ModelConfig) -> Work:
        pieces, flops = math.ceil(rows / setup.score_batch), forward_flops(model, rows, 0, length, answer)
        return Work(flops, flops, pieces * multiplied(model), pieces * gathered(model) + rows * length * token(model))

    student, teacher = models.student, models.shapes[config.branches[branch].teacher]
    learnt = weights(student, config.optimizer.trained)
    part = learnt / weights(student)
    passes, pieces = PASSES[config.compute.remat] - 1 + part, math.ceil(kept / config.optimizer.micro_batch)
    forward = forward_flops(student, kept, 0, length, answer)
    summed = 4 * learnt / tensor  # gradients in float32, each chip its part
    gradient = Work(
        (2 + part) * forward,
        passes * forward,
        pieces * (3 * multiplied(student) + 2 * summed / fsdp),
        pieces * (2 * gathered(student) + summed * (fsdp - 1) / fsdp) + passes * kept * length * token(student),
    )
    scores = {} if setup.trusts_sampler else {"score student": score(student)}
    return scores | {"score teacher": score(teacher), "gradient": gradient}


def _reduced(model: ModelConfig, item: int, tensor: int) -> float:
    """Bytes that a token costs a chip in a forward pass: twice a layer, what the split heads and the split feed-forward
    add is summed, there and back around a ring."""
    return 2 * model.num_layers * model.hidden_size * item * 2 * (tensor - 1) / tensor


# ----------------------------------------------------------------------------------------- memory


def memory_estimate(setup: Setup, models: Models) -> dict[str, float]:
    """Bytes on one chip from shapes: what lies there through the run, "resident", and what each program adds.

    Rough in the temporaries: a layer's live activations are counted, not scheduled. Good for leaving out what cannot
    fit; the compiler has the last word.
    """
    config, student, teacher_item = setup.config, models.student, jnp.dtype(setup.teacher_dtype).itemsize
    split = setup.mesh.shape["fsdp"] * setup.mesh.shape["tensor"]
    learnt = weights(student, config.optimizer.trained) / split
    teachers = [weights(shape) * teacher_item / split for shape in models.shapes.values()]
    parameters = weights(student) * jnp.dtype(config.compute.params).itemsize / split
    moments = 8 * learnt * len(moment_names(config))
    gradients = 4 * learnt * (len(config.branches) if config.method.schedule == schedule.MIXED else 1)
    added = _rollout_memory(setup, student) | _learning_memory(setup, student, gradients) | {"update": gradients}
    if config.compute.offload == "off":
        return {"resident": parameters + moments + sum(teachers), **added}
    returned = {"gradient": moments if config.compute.offload == "ahead" else 0, "update": moments}
    return {"resident": parameters} | {name: n + returned.get(name, max(teachers)) for name, n in added.items()}


def _rollout_memory(setup: Setup, model: ModelConfig) -> dict[str, float]:
    fsdp, tensor, shards = *list(setup.rollout_mesh.shape.values())[1:], batch_shards(setup.rollout_mesh)
    item, prompt, branch = jnp.dtype(setup.dtype).itemsize, setup.config.rollout.max_prompt_tokens, _largest(setup)
    lanes = lanes_of(setup, branch)
    copy = weights(model) * item / (fsdp * tensor) + (2 * _layer(model) * item / tensor if fsdp > 1 else 0)
    slot = (cache_bytes(model, item) / tensor + _stream(setup, model)) / shards  # of one lane
    filled = slot * lanes * setup.context
    prefilled = (slot + _live(model, tensor) * item / shards) * prompt  # of one lane
    added = {
        "reshard": copy,
        "prefill": copy + lanes * prefilled,
        "decode": copy + filled * (1 + 1 / model.num_layers),
    }
    times, several = refills(setup, branch)
    return added | ({"refill": copy + filled + several * prefilled} if times else {})


def _learning_memory(setup: Setup, model: ModelConfig, gradients: float) -> dict[str, float]:
    compute, rollout, (_, fsdp, tensor) = setup.config.compute, setup.config.rollout, setup.mesh.shape.values()
    item, shards, answer = jnp.dtype(setup.dtype).itemsize, batch_shards(setup.mesh), rollout.max_response_tokens
    head, live = model.vocab_size * model.hidden_size, _live(model, tensor)
    wide, enters = live - 4 * model.hidden_size, model.hidden_size / tensor
    saved = {"rollout": enters, "block": enters, "dots": enters + wide, "none": 4 * enters + 2 * wide}[compute.remat]
    gathered = (2 * _layer(model) + head) / tensor  # weights of two layers, and the head
    hidden = any(objective.teacher_logits for objective in setup.objectives.values()) * model.hidden_size * item
    waits = rollout.batch_size / shards * (_stream(setup, model) * setup.context + hidden * answer)

    def of(rows: float, layers: float, item_of_gathered: int) -> float:
        """Of so many rows of a chip, with what is saved of so many layers."""
        logits = min(tokens_at_once(compute.logits_chunk, model.vocab_size, tensor), rows * answer)
        activations = rows * setup.context * (layers * saved + live) * item
        return waits + activations + gathered * item_of_gathered + logits * 8 * model.vocab_size / tensor

    micro = setup.config.optimizer.micro_batch / shards
    fresh = 8 * head / (fsdp * tensor)  # gradients of embedding and head, added once they are complete
    learning = gradients + fresh + of(micro, model.num_layers, item + 4) + micro * setup.context * live * item
    return {"score": of(setup.score_batch / shards, 0, item), "gradient": learning}


def _largest(setup: Setup) -> str:
    """The branch with the most rows."""
    return max(setup.rows, key=setup.rows.__getitem__)


def _layer(model: ModelConfig) -> float:
    """Weights of one layer's products."""
    return (matrix_weights(model) - model.vocab_size * model.hidden_size) / model.num_layers


def _live(model: ModelConfig, tensor: int) -> float:
    """Numbers of a token in the middle of a layer."""
    return 4 * model.hidden_size + 2 * (model.intermediate_size + model.num_heads * model.head_dim) / tensor


def _stream(setup: Setup, model: ModelConfig) -> int:
    """Bytes of a token's residual stream, where it is kept."""
    return setup.keep_residuals * (model.num_layers + 1) * model.hidden_size * jnp.dtype(setup.dtype).itemsize
