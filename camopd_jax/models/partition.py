"""Which parameters are trained. A run's state holds those alone; the others are frozen, and lie in its student.

All that follows a state (gradient, moments, checkpoints, shardings, plans) follows the split by itself: a tree of
trained parameters is the tree of all without the leaves, and the empty branches, of the frozen ones.
"""

import re

import jax

from camopd_jax.errors import UserError
from camopd_jax.types import Params

ALL = "all"


def trained(params: Params, rule: str) -> Params:
    """The trained part of a tree of parameters, or of a tree like them.

    Args:
      rule: "all", or a regular expression that is searched for in names such as layers.attention.query.kernel.

    Raises:
      UserError: if it matches no parameter.
    """
    if rule == ALL:
        return params
    part = _matching(params, re.compile(rule), "")
    if not part:
        names = (".".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
        raise UserError(
            f"config.optimizer.trained is {rule!r}, which matches no parameter name; the names are {', '.join(names)}"
        )
    return part


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
    """The leaves of a tree that another has too."""
    return {name: subset(tree[name], node) if isinstance(node, dict) else tree[name] for name, node in like.items()}


def merge(tree: Params, part: Params) -> Params:
    """A tree with the leaves of a part of it in the place of its own."""
    if not isinstance(part, dict):
        return part
    return {name: merge(node, part[name]) if name in part else node for name, node in tree.items()}
