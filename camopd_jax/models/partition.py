"""Splits parameters into trained and frozen ones.

In a tree with an adapter, its matrices are trained and nothing else. The tree of trained parameters is the tree of all
parameters without the frozen leaves and without empty subtrees. A run's state, gradient, moments and checkpoints have
only this tree.
"""

import re

import jax

from camopd_jax.errors import UserError
from camopd_jax.models import adapters
from camopd_jax.models.config import ModelConfig
from camopd_jax.types import Params

ALL = "all"  # all parameters but the routers of mixtures of experts
ROUTERS = ("router", "router_norm")  # of mixtures of experts, and the norms of their inputs


def trained(params: Params, rule: str) -> Params:
    """The trained parameters of a tree of parameters, or the same leaves of a tree like it.

    Args:
      rule: "all", which leaves out the routers of mixtures of experts, or a regular expression that is searched for in
        names such as layers.attention.query.kernel. It never selects the frozen parameters of a tree with an adapter.

    Raises:
      UserError: if it matches no parameter.
    """
    params = adapters.matrices(params) or params
    if rule == ALL:
        return _without_routers(params)
    part = _matching(params, re.compile(rule), "")
    if not part:
        names = (".".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
        raise UserError(
            f"config.optimizer.trained is {rule!r}, which matches no parameter name; the names are {', '.join(names)}"
        )
    return part


def frozen_routers(config: ModelConfig, rule: str) -> bool:
    """Whether a model has routers that are not trained."""
    if config.routing is None:
        return False
    module = "mlp" if config.dense_size is None else "experts"
    return rule == ALL or not re.search(rule, f"layers.{module}.router.kernel")


def _without_routers(tree: Params) -> Params:
    if not isinstance(tree, dict):
        return tree
    return {name: _without_routers(node) for name, node in tree.items() if name not in ROUTERS}


def _matching(tree: Params, pattern: re.Pattern[str], prefix: str) -> Params:
    part = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        if isinstance(node, dict):
            node = _matching(node, pattern, f"{path}.")
            if node:
                part[name] = node
        elif pattern.search(path):
            part[name] = node
    return part


def subset(tree: Params, like: Params) -> Params:
    """The leaves of `tree` that are also in `like`."""
    return {name: subset(tree[name], node) if isinstance(node, dict) else tree[name] for name, node in like.items()}


def merge(tree: Params, part: Params) -> Params:
    """`tree` with its leaves replaced by those of `part`, which may have fewer leaves."""
    if not isinstance(part, dict):
        return part
    return {name: merge(node, part[name]) if name in part else node for name, node in tree.items()}
