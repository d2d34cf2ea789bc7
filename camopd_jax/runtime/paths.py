"""Paths as users write them."""

import os
from pathlib import Path


def in_home(name: str | Path) -> Path:
    """The path, with a user's home directory in place of "~" or "~NAME", if there is that user."""
    return Path(os.path.expanduser(name))
