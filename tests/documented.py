"""The keys of files that docs/metrics.md explains."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def documented_keys(name):
    """The keys in the first column of the table of `name`.jsonl."""
    _, _, rest = PAGE.read_text().partition(f"\n## {name}.jsonl")
    cells = [line.split("|")[1] for line in rest.split("\n## ")[0].splitlines() if line.startswith("| `")]
    return {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}
