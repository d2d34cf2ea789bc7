"""What a run costs by arithmetic: FLOPs, bytes and memory.

FLOPs are counted from the model, not from the compiler: 2 per weight of a matrix product and token (twice
that again in a backward pass), and 4 x heads x head width per pair of positions in attention. Bytes of a decode
turn: all weights once, and the keys and values of the cache.
"""

import math
from collections.abc import Mapping
from functools import cache

import jax.numpy as jnp
import numpy as np

from camopd_jax.config.schema import TrainConfig
from camopd_jax.inference import loading
from camopd_jax.method import loop
from camopd_jax.models.config import ModelConfig
from camopd_jax.models.weights import table
from camopd_jax.rollout.generate import FIRST_RING, entering
from camopd_jax.rollout.score import tokens_at_once
from camopd_jax.runtime.buckets import bucket
from camopd_jax.runtime.mesh import fill_sizes

Sizes = Mapping[str, int]  # of a mesh: {"data", "fsdp", "tensor"}


@cache
def matrix_weights(config: ModelConfig) -> int:
    """Weights that a token meets in a matrix product: all kernels and the head, without the embedding's look-up."""
    kernels = sum(int(np.prod(row.shape(config.num_layers))) for row in table(config) if row.path[-1] == "kernel")
    return kernels + config.vocab_size * config.hidden_size


@cache
def weights(config: ModelConfig) -> int:
    """All parameters."""
    return sum(math.prod(row.shape(config.num_layers)) for row in table(config))


def forward_flops(config: ModelConfig, batch: int, start: int, end: int, logits: int) -> float:
    """Of `batch` rows, positions start..end, with logits at `logits` positions of each."""
    pairs = _sum(start + 1, end + 1)
    head = config.vocab_size * config.hidden_size
    dense = 2 * ((matrix_weights(config) - head) * (end - start) + head * logits)
    return batch * (dense + 4 * config.num_layers * config.num_heads * config.head_dim * pairs)


def adam_bytes(config: TrainConfig, student: ModelConfig) -> int:
    """Of Adam's moments, on all chips together."""
    return weights(student) * 8 * {"shared": 1, "separate": 2}[config.method.moments]


def cache_bytes(config: ModelConfig, item_bytes: int) -> int:
    """Keys and values of one token."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * item_bytes


def residual_bytes(config: ModelConfig, item_bytes: int) -> int:
    """The residual stream of one token."""
    return (config.num_layers + 1) * config.hidden_size * item_bytes


def decode_bytes(config: ModelConfig, batch: int, prompt: int, answer: int, item_bytes: int) -> float:
    """The least that a batch's decode turns have to read: weights once a turn, keys and values of the tokens before."""
    cache = cache_bytes(config, item_bytes)
    return answer * matrix_weights(config) * item_bytes + batch * cache * _sum(prompt, prompt + answer)


def _sum(start: int, end: int) -> int:
    """start + (start + 1) + ... + (end - 1)."""
    return (end - start) * (start + end - 1) // 2


# ---------------------------------------------------------------------------------------- rollouts


def rollout_sizes(config: TrainConfig, mesh: Sizes) -> dict[str, int]:
    """Of the mesh that answers are made on (`phases.rollout_mesh`)."""
    wanted, chips = config.rollout.mesh, math.prod(mesh.values())
    sizes = {"data": wanted.data, "fsdp": wanted.fsdp, "tensor": wanted.tensor or mesh["tensor"]}
    return dict(zip(sizes, fill_sizes(sizes.values(), chips), strict=True))


def refills(rows: int, places: int, mesh: Sizes) -> tuple[int, int]:
    """(how often prompts that wait take free places, how many at one time), as `generate.answers` does it."""
    several = entering(places, mesh["data"] * mesh["fsdp"])
    return max(0, math.ceil((rows - places) / several)), several


def turns(rows: int, places: int, answer: int) -> int:
    """Of decoding, where every answer has `answer` tokens."""
    return answer * math.ceil(rows / places)


def slots_read(rows: int, places: int, prompt: int, answer: int, cap: int) -> int:
    """Slots of the cache that one place's turns read in all: every turn the whole ring, which doubles as it fills."""
    ring, done, read = min(FIRST_RING, cap), 0, 0
    while done < answer:
        read += (min(answer, ring) - done) * ring
        done, ring = min(answer, ring), min(2 * ring, cap)
    later = (math.ceil(rows / places) - 1) * answer * min(bucket(answer, FIRST_RING), cap)
    return turns(rows, places, answer) * prompt + read + later


def kept_rows(config: TrainConfig, branch: str) -> int:
    """Rows of which an update learns, at most: the largest scores reach a share of the mass within that share of rows.

    A review before any recovery keeps all.
    """
    return math.ceil(getattr(config.method, branch).mass * loop.batch_rows(config)[branch])


def scoring_pieces(config: TrainConfig, rows: int) -> int:
    """Forward passes that score so many rows."""
    return math.ceil(rows / loop.score_batch(config))


def learning_pieces(config: TrainConfig, rows: int) -> int:
    """Micro-batches that so many rows make."""
    return math.ceil(rows / config.optimizer.micro_batch)


# ----------------------------------------------------------------------------------------- memory


def memory_estimate(
    config: TrainConfig, general: ModelConfig, student: ModelConfig, mesh: Sizes, platform: str
) -> dict[str, float]:
    """Bytes on one chip, roughly, from shapes: what always lies there, and what each program adds for its time.

    Rough in the temporaries: a layer's live activations are counted, not scheduled. Good for leaving out what cannot
    fit; the compiler has the last word.
    """
    item = jnp.dtype(loading.matmul_dtype(config.compute, platform)).itemsize
    teacher = jnp.dtype(loading.teacher_dtype(config.compute, platform)).itemsize
    split, tensor = mesh["fsdp"] * mesh["tensor"], mesh["tensor"]
    master = jnp.dtype(config.compute.params).itemsize
    n, d, layers = weights(student), student.hidden_size, student.num_layers
    adam, teachers = adam_bytes(config, student) / split, (n + weights(general)) * teacher / split
    prompt, answer = config.rollout.max_prompt_tokens, config.rollout.max_response_tokens
    of_layers = (matrix_weights(student) - student.vocab_size * d) / layers

    def live(tensor: int) -> float:
        """Of a token, in the middle of a layer."""
        wide = (2 * student.intermediate_size + 2 * student.num_heads * student.head_dim) / tensor
        return (4 * d + wide) * item

    sizes = rollout_sizes(config, mesh)
    shards = sizes["data"] * sizes["fsdp"]
    rows = max(loop.batch_rows(config).values())
    places = min(config.rollout.places or rows, rows)
    copy = n * item / (sizes["fsdp"] * sizes["tensor"])
    if sizes["fsdp"] > 1:
        copy += 2 * of_layers * item / sizes["tensor"]
    stream = residual_bytes(student, item) if config.compute.remat == "rollout" else 0
    slot = cache_bytes(student, item) / sizes["tensor"] / shards + stream / shards  # of one place
    cache = slot * places * (prompt + answer)
    prefilled = slot * prompt + live(sizes["tensor"]) * prompt / shards  # of one place

    micro, scored = (
        n / (mesh["data"] * mesh["fsdp"]) for n in (config.optimizer.micro_batch, loop.score_batch(config))
    )
    wide = live(tensor) / item - 4 * d
    enters, stream = d / tensor, stream * config.rollout.batch_size * (prompt + answer) / (mesh["data"] * mesh["fsdp"])
    saved = {"rollout": enters, "block": enters, "dots": enters + wide, "none": 4 * enters + 2 * wide}[
        config.compute.remat
    ]
    gathered = (2 * of_layers + student.vocab_size * d) / tensor  # weights of two layers, and the head
    tokens = tokens_at_once(config.compute.logits_chunk, student.vocab_size, tensor)
    logit = 2 * student.vocab_size / tensor * 4  # of a token
    gradients = 1 if config.method.schedule == "alternate" else 2
    fresh = 2 * student.vocab_size * d  # of embedding and head, added once they are whole
    found = {
        "reshard": copy,
        "prefill": copy + places * prefilled,
        "decode": copy + cache * (1 + 1 / layers),
        "score": stream
        + scored * (prompt + answer) * live(tensor)
        + gathered * item
        + min(tokens, scored * answer) * logit,
        "gradient": stream
        + 4 * (n * gradients + fresh) / split
        + micro * (prompt + answer) * (layers * saved * item + 2 * live(tensor))
        + gathered * (item + 4)
        + min(tokens, micro * answer) * logit,
        "update": 4 * n * gradients / split,
    }
    if places < rows:
        found["refill"] = copy + cache + refills(rows, places, sizes)[1] * prefilled
    if config.compute.offload == "off":
        return {"resident": n * master / split + adam + teachers, **found}
    teacher = max(n, weights(general)) * teacher / split
    learning = {"gradient": adam if config.compute.offload == "ahead" else 0, "update": adam}
    waits = {name: needed + learning.get(name, teacher) for name, needed in found.items()}
    return {"resident": n * master / split} | waits
