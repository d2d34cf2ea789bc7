"""JSON lines written whole: a reader never sees half a file."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from camopd_jax.errors import UserError


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one object a line to a part file beside `path`, then moves it there.

    Raises:
      UserError: if the file cannot be written; what was at `path` before is still there.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write ({error.strerror}); choose another place or free some room") from error
