"""A lock on a work directory: one run at a time writes there."""

import os
import socket
from typing import TextIO

from etils import epath

from camopd_jax.errors import UserError
from camopd_jax.runs.workdir import write_errors

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


def lock(workdir: epath.Path) -> TextIO | None:
    """The open file `workdir/lock`, locked until it is closed or the process ends, however it ends.

    POSIX record locks hold between hosts too where a network file system supports them. Without locks, as in a bucket,
    the result is None.

    Raises:
      UserError: naming the process that holds it.
    """
    if fcntl is None or "://" in str(workdir):
        return None
    with write_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / "lock", "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"{workdir}: {holder} is running there; wait for it, stop it, or give another --workdir"
        ) from error
    except OSError:  # a file system without locks
        file.close()
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
