"""What a run costs by arithmetic: FLOPs, bytes, memory and the seconds that a chip's limits leave at best.

FLOPs are counted from the model, not from the compiler: 2 per weight of a matrix product and token (twice
that again in a backward pass), and 4 x heads x head width per pair of positions in attention. Bytes of a decode
turn: all weights once, and the keys and values that are there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from camopd_jax import engine, phases
from camopd_jax.config import TrainConfig
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.weights import table
from camopd_jax.planning.topology import Chip

BACKWARD = {"none": 3, "dots": 3, "block": 4}  # forward passes that forward and backward are worth, with remat


def matrix_weights(config: ModelConfig) -> int:
    """Weights that a token meets in a matrix product: all kernels and the head, without the embedding's look-up."""
    kernels = sum(int(np.prod(row.shape(config.num_layers))) for row in table(config) if row.path[-1] == "kernel")
    return kernels + config.vocab_size * config.hidden_size


def weights(config: ModelConfig) -> int:
    """All parameters."""
    return sum(math.prod(row.shape(config.num_layers)) for row in table(config))


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
    """Read by a whole rollout's decode turns: weights once a turn, keys and values of the tokens before."""
    cache = cache_bytes(config, item_bytes)
    return answer * matrix_weights(config) * item_bytes + batch * cache * _sum(prompt, prompt + answer)


def _sum(start: int, end: int) -> int:
    """start + (start + 1) + ... + (end - 1)."""
    return (end - start) * (start + end - 1) // 2


# ------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Work:
    """What a stage of a step asks of the chips."""

    flops: float  # of the model, on all chips together
    done: float  # FLOPs with what remat computes again
    read: float  # bytes from HBM, on each chip
    received: float  # bytes from other chips, on each chip

    def seconds(self, chip: Chip, chips: int) -> float:
        """At the chip's limits: the slowest of products, HBM and links, each at its peak and hidden by none else."""
        return max(self.done / chips / chip.flops, self.read / chip.hbm_bandwidth,
                   self.received / (chip.ici_bandwidth / 2))  # fmt: skip


def kept_rows(config: TrainConfig, phase: str) -> int:
    """Rows of which an update learns, at most: the largest scores reach a share of the mass within that share of rows.

    A review before any recovery keeps all.
    """
    rows = phases.batch_rows(config)
    acting = phases.ACTING[phase]
    return sum(math.ceil(getattr(config.method, name).mass * rows[name]) for name in acting)


def stage_work(
    config: TrainConfig, model: ModelConfig, mesh: Mapping[str, int], platform: str, phase: str, answer: int
) -> dict[str, Work]:
    """The stages of a step in which every prompt has its cap's length and every answer `answer` tokens."""
    item = jnp.dtype(engine.matmul_dtype(config.compute, platform)).itemsize
    prompt, length = config.rollout.max_prompt_tokens, config.rollout.max_prompt_tokens + answer
    rows, kept = sum(phases.batch_rows(config)[name] for name in phases.ACTING[phase]), kept_rows(config, phase)
    shards, tensor = mesh["data"] * mesh["fsdp"], mesh["tensor"]
    # Parameters split over fsdp are gathered where they are used: in a rollout, by today's programs, at every turn.
    share = matrix_weights(model) * item / tensor  # of the weights, what one chip multiplies with
    gathered = share * (mesh["fsdp"] - 1) / mesh["fsdp"]
    cache = cache_bytes(model, item) / tensor * rows / shards
    prefill, decode = forward_flops(model, rows, 0, prompt, 0), forward_flops(model, rows, prompt, length, answer)
    forward = forward_flops(model, rows, 0, length, answer)
    learnt = forward_flops(model, kept, 0, length, answer)
    micro_batches = math.ceil(kept / config.optimizer.micro_batch)
    # Two all-reduces a layer of what the split heads and the split feed-forward add, there and back around a ring.
    token = 2 * model.num_layers * model.hidden_size * item * 2 * (tensor - 1) / tensor / shards
    state = weights(model) / (mesh["fsdp"] * tensor) * 4  # float32 gradients, parameters and two moments
    work = {
        "prefill": Work(prefill, prefill, share + cache * prompt, gathered + rows * prompt * token),
        "decode": Work(
            decode, decode, answer * share + cache * _sum(prompt, length), answer * (gathered + rows * token)
        ),
        "score teacher": Work(forward, forward, share, gathered + rows * length * token),
        "update": Work(
            3 * learnt, BACKWARD[config.compute.remat] * learnt,
            micro_batches * (3 * share + 2 * state) + 7 * state,
            micro_batches * (2 * gathered + 4 * weights(model) / tensor * (mesh["fsdp"] - 1) / mesh["fsdp"])
            + BACKWARD[config.compute.remat] * kept * length * token,
        ),
    }  # fmt: skip
    if not phases.trusts_sampler(config, engine.matmul_dtype(config.compute, platform)):
        work["score student"] = Work(forward, forward, share, gathered + rows * length * token)
    return work


def phase_shares(config: TrainConfig) -> dict[str, float]:
    """How often each phase comes."""
    if config.method.schedule == "mixed":
        return {"mixed": 1.0}
    cycle = config.method.recovery_steps + config.method.review_steps
    counts = {"recovery": config.method.recovery_steps, "review": config.method.review_steps}
    return {phase: n / cycle for phase, n in counts.items() if n}


# ----------------------------------------------------------------------------------------- memory


def memory_estimate(
    config: TrainConfig, general: ModelConfig, student: ModelConfig, mesh: Mapping[str, int], platform: str
) -> dict[str, float]:
    """Bytes on one chip, roughly, from shapes: what always lies there, and what each program adds for its time.

    Rough in the temporaries: a layer's live activations are counted, not scheduled. Good for leaving out what cannot
    fit; the compiler has the last word.
    """
    item = jnp.dtype(engine.matmul_dtype(config.compute, platform)).itemsize
    teacher = jnp.dtype(engine.teacher_dtype(config.compute, platform)).itemsize
    split, tensor = mesh["fsdp"] * mesh["tensor"], mesh["tensor"]
    master = jnp.dtype(config.compute.params).itemsize
    moments = 1 if config.method.moments == "shared" else 2
    n = weights(student)
    resident = n * (master + 8 * moments) / split + (n + weights(general)) * teacher / split

    rows = max(phases.batch_rows(config).values()) / (mesh["data"] * mesh["fsdp"])
    micro = config.optimizer.micro_batch / (mesh["data"] * mesh["fsdp"])
    slots = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    d, layers = student.hidden_size, student.num_layers
    layer = (matrix_weights(student) - student.vocab_size * d) / layers / tensor  # weights of one, gathered
    wide = (2 * student.intermediate_size + 2 * student.num_heads * student.head_dim) / tensor
    token = (4 * d + wide) * item  # live in the middle of a layer
    between = d / tensor  # of the residual stream, where every token is by itself
    kept = {"block": between, "dots": between + wide, "none": 4 * between + 2 * wide}[
        config.compute.remat
    ]  # of a layer
    head = student.vocab_size * d / tensor  # gathered once; an update adds its gradient up in float32
    prompt, answer = config.rollout.max_prompt_tokens, config.rollout.max_response_tokens
    cache = cache_bytes(student, item) / tensor * rows * (slots + 0.7 * (prompt + answer / 2))  # it grows
    return {
        "resident": resident,
        "rollout": cache + n * item / split + 2 * layer * item + rows * prompt * token,
        "score": rows * slots * token + 2 * layer * item + head * item,
        "update": micro * slots * (layers * kept * item + 2 * token)
        + 8 * n / split + 2 * layer * (item + 4) + head * (item + 4),
    }  # fmt: skip
