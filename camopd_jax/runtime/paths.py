"""Paths as users write them."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder of this user's files of a kind that may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "camopd_jax" / kind


def in_home(name: str | Path) -> Path:
    """The path, with a user's home directory in place of "~" or "~NAME", if there is that user."""
    return Path(os.path.expanduser(name))
