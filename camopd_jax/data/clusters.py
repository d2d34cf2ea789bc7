"""Clusters of prompts by a model's hidden states, and sets that are spread over them."""

from collections.abc import Sequence

import numpy as np
from scipy.cluster.vq import kmeans2

ITERATIONS = 50


def cluster(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The cluster of each row, int[N], by k-means with k-means++ starts. Clusters are numbered by descending size.

    Args:
      features: float[N, D]; rows are compared by direction.
      count: at most this many clusters; empty ones are left out.
    """
    directions = features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-9)
    count = min(count, len(np.unique(directions, axis=0)))
    start = np.random.default_rng(seed)
    _, labels = kmeans2(directions.astype(np.float64), count, iter=ITERATIONS, minit="++", seed=start)
    _, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    return rank[labels]


def spread(groups: Sequence[int] | np.ndarray, count: int) -> list[int]:
    """`count` row numbers, ascending: the first ones of each group, with the smallest cap per group that gives as many.

    All row numbers if there are no more. Of the groups that reach the cap, the first ones have one more row.

    >>> spread([0, 0, 0, 0, 0, 1, 1, 2], 5)
    [0, 1, 5, 6, 7]
    """
    groups = np.asarray(groups)
    order = np.argsort(groups, kind="stable")
    sorted_groups = groups[order]
    nth = np.empty(len(groups), int)  # the number of each row within its group
    nth[order] = np.arange(len(groups)) - np.searchsorted(sorted_groups, sorted_groups)
    chosen = np.lexsort((np.arange(len(groups)), groups, nth))[:count]
    return sorted(chosen.tolist())
