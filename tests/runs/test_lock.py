"""A work directory belongs to one process at a time."""

import os
import subprocess
import sys

import pytest
from etils import epath

from camopd_jax.errors import UserError
from camopd_jax.runs.lock import lock

HOLDER = """
import sys, time
from etils import epath
from camopd_jax.runs.lock import lock
file = lock(epath.Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_until_the_first_is_killed(holder, tmp_path):
    with pytest.raises(UserError, match=f"process {holder.pid} on .+ is running there"):
        lock(epath.Path(tmp_path))
    holder.kill()
    holder.wait()
    with lock(epath.Path(tmp_path)):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_bucket_has_no_lock():
    assert lock(epath.Path("gs://bucket/run")) is None
