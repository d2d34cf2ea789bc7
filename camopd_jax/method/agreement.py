"""Monitors of how far student and teacher agree on their likeliest tokens (Rethinking OPD, arXiv 2604.13016).

With K_S and K_T the k likeliest tokens of student S and teacher T, and H the entropy of a distribution:

    overlap_ratio      |K_S and K_T| / k
    overlap_advantage  sum S (log T - log S) / sum S over the tokens in both sets; 0 if there are none
    entropy_gap        |H(T) - H(S)|

The paper reports that the ratio rises and the advantage nears 0 where distillation succeeds.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from camopd_jax.method.objectives.top_k import top_k
from camopd_jax.rollout.sampling import entropy
from camopd_jax.types import Record

MONITORS = ("overlap_ratio", "overlap_advantage", "entropy_gap")


@dataclass(frozen=True)
class Agreement:
    """Hashable: part of static arguments of compiled functions."""

    k: int  # a vocabulary with fewer tokens is used in full

    def read(self, logits: jax.Array, targets: Record) -> Record:
        """The teacher's values to store, as `Objective.read`."""
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        values, ids = top_k(log_probs, self.k)
        return {"agreement_ids": ids, "agreement_log_probs": values, "entropy": entropy(log_probs)}

    def measure(self, logits: jax.Array, targets: Record) -> Record:
        """The monitors of each token, float32[...] by name; constants.

        Args:
          logits: the student's, float32[..., V].
        """
        log_probs = jax.nn.log_softmax(jax.lax.stop_gradient(logits), axis=-1)
        ids, teacher = targets["agreement_ids"], targets["agreement_log_probs"]
        student = jnp.take_along_axis(log_probs, ids, axis=-1)
        in_both = jnp.any(ids[..., None] == top_k(log_probs, self.k)[1][..., None, :], axis=-1)
        probability = jnp.where(in_both, jnp.exp(student), 0)
        mass = jnp.sum(probability, axis=-1)
        advantage = jnp.sum(jnp.where(in_both, probability * (teacher - student), 0), axis=-1)
        return {
            "overlap_ratio": jnp.mean(in_both, axis=-1, dtype=jnp.float32),
            "overlap_advantage": jnp.where(mass > 0, advantage / jnp.where(mass > 0, mass, 1), 0),
            "entropy_gap": jnp.abs(targets["entropy"] - entropy(log_probs)),
        }
