"""The stages of a step: what each asks of the chips, and the seconds that their limits leave at best."""

from dataclasses import dataclass

import jax.numpy as jnp

from camopd_jax.config.schema import TrainConfig
from camopd_jax.inference import loading
from camopd_jax.method import loop
from camopd_jax.models.config import ModelConfig
from camopd_jax.planning.costs import (
    Sizes,
    cache_bytes,
    forward_flops,
    kept_rows,
    learning_pieces,
    matrix_weights,
    refills,
    rollout_sizes,
    scoring_pieces,
    slots_read,
    turns,
    weights,
)
from camopd_jax.planning.topology import Chip

# Forward passes that forward and backward are worth, with remat
BACKWARD = {"none": 3, "dots": 3, "block": 4, "rollout": 3}


@dataclass(frozen=True)
class Work:
    """What a stage of a step asks of the chips."""

    flops: float  # of the model, on all chips together
    done: float  # FLOPs with what remat computes again
    read: float  # bytes from HBM, on each chip
    received: float  # bytes from other chips, on each chip

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def seconds(self, chip: Chip, chips: int) -> float:
        """At the chip's limits: the slowest of products, HBM and links, each at its peak and hidden by none else."""
        return max(self.done / chips / chip.flops, self.read / chip.hbm_bandwidth,
                   self.received / (chip.ici_bandwidth / 2))  # fmt: skip


def stage_work(
    config: TrainConfig, model: ModelConfig, mesh: Sizes, platform: str, phase: str, answer: int
) -> dict[str, Work]:
    """The stages of a step in which every prompt has its cap's length and every answer `answer` tokens."""
    total: dict[str, Work] = {}
    for branch in loop.ACTING[phase]:
        for part in (_rollout_work, _learning_work):
            for name, work in part(config, model, mesh, platform, branch, answer).items():
                total[name] = total[name] + work if name in total else work
    state = weights(model) / (mesh["fsdp"] * mesh["tensor"]) * 4  # each of parameters, moments and gradient
    return total | {"update": Work(0, 0, 7 * state, 0)}


def _rollout_work(
    config: TrainConfig, model: ModelConfig, mesh: Sizes, platform: str, branch: str, answer: int
) -> dict[str, Work]:
    """On the rollout's mesh, where weights that are split over fsdp are gathered at every turn."""
    item = jnp.dtype(loading.matmul_dtype(config.compute, platform)).itemsize
    sizes, prompt = rollout_sizes(config, mesh), config.rollout.max_prompt_tokens
    rows = loop.batch_rows(config)[branch]
    places = min(config.rollout.places or rows, rows)
    shards, tensor, fsdp = sizes["data"] * sizes["fsdp"], sizes["tensor"], sizes["fsdp"]
    share = matrix_weights(model) * item / tensor  # of the weights, what one chip multiplies with
    gathered = share * (fsdp - 1) / fsdp
    copy, master = weights(model) * item / (fsdp * tensor), weights(model) * 4 / (mesh["fsdp"] * mesh["tensor"])
    kept_here = min(1.0, fsdp * tensor / (mesh["fsdp"] * mesh["tensor"]))  # of the copy, what lay there before
    cache = cache_bytes(model, item) / tensor * places / shards  # of one slot of all of a chip's places
    begun = 1 + refills(rows, places, sizes)[0]
    token = _reduced(model, item, tensor) / shards
    prefill = forward_flops(model, rows, 0, prompt, 0)
    decode = forward_flops(model, rows, prompt, prompt + answer, answer)
    n = turns(rows, places, answer)
    slots = slots_read(rows, places, prompt, answer, config.rollout.max_response_tokens)
    return {
        "reshard": Work(0, 0, master + copy, copy * (1 - kept_here)),
        "prefill": Work(prefill, prefill, begun * share + cache * prompt, begun * gathered + rows * prompt * token),
        "decode": Work(decode, decode, n * share + cache * slots, n * gathered + rows * answer * token),
    }


def _learning_work(
    config: TrainConfig, model: ModelConfig, mesh: Sizes, platform: str, branch: str, answer: int
) -> dict[str, Work]:
    """Scores and gradient: parameters split over fsdp are gathered layer by layer, once for each piece."""
    dtype = loading.matmul_dtype(config.compute, platform)
    item, length = jnp.dtype(dtype).itemsize, config.rollout.max_prompt_tokens + answer
    rows, kept = loop.batch_rows(config)[branch], kept_rows(config, branch)
    fsdp, tensor = mesh["fsdp"], mesh["tensor"]
    share = matrix_weights(model) * item / tensor
    gathered = share * (fsdp - 1) / fsdp
    token = _reduced(model, item, tensor) / (mesh["data"] * fsdp)
    forward = forward_flops(model, rows, 0, length, answer)
    learnt = forward_flops(model, kept, 0, length, answer)
    scored, micro_batches = scoring_pieces(config, rows), learning_pieces(config, kept)
    score = Work(forward, forward, scored * share, scored * gathered + rows * length * token)
    state = weights(model) / (fsdp * tensor) * 4
    passes = BACKWARD[config.compute.remat]
    summed = 4 * weights(model) / tensor * (fsdp - 1) / fsdp  # float32 gradients, each chip its part
    work = {
        "score teacher": score,
        "gradient": Work(
            3 * learnt, passes * learnt, micro_batches * (3 * share + 2 * state),
            micro_batches * (2 * gathered + summed) + passes * kept * length * token,
        ),
    }  # fmt: skip
    return work if loop.trusts_sampler(config, dtype) else {"score student": score} | work


def _reduced(model: ModelConfig, item: int, tensor: int) -> float:
    """Bytes that a token costs a chip in a forward pass: twice a layer, what the split heads and the split feed-forward
    add is summed, there and back around a ring."""
    return 2 * model.num_layers * model.hidden_size * item * 2 * (tensor - 1) / tensor


def phase_shares(config: TrainConfig) -> dict[str, float]:
    """How often each phase comes."""
    if config.method.schedule == "mixed":
        return {"mixed": 1.0}
    cycle = config.method.recovery_steps + config.method.review_steps
    counts = {"recovery": config.method.recovery_steps, "review": config.method.review_steps}
    return {phase: n / cycle for phase, n in counts.items() if n}
