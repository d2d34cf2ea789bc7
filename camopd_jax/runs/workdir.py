"""Checks that a work directory belongs to the present run, by its config.json."""

import contextlib
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from etils import epath

from camopd_jax.config.identity import different_fields, fingerprint, to_json, with_new_fields
from camopd_jax.config.schema import Config
from camopd_jax.data import dates
from camopd_jax.errors import UserError
from camopd_jax.runtime.distributed import broadcast, run_on_all

_COMMANDS = {"TrainConfig": "train", "SftConfig": "sft"}  # by the kind of config


def claim_workdir(workdir: epath.Path, config: Config) -> None:
    """Writes workdir/config.json, or checks that an existing one is from the same run. Only process 0 writes.

    Fields without effect on the results (`config.identity.fingerprint`) may change when a run is resumed.

    Raises:
      UserError: if the directory belongs to another run, or if this process has a config other than process 0's, naming
        the different fields; and if the hosts do not share the directory.
    """
    owner = broadcast(lambda: _claim(workdir, config))
    run_on_all(lambda: _check_same_everywhere(workdir, config, owner))


def fix_date(workdir: epath.Path) -> None:
    """Lets chat templates write the time at which a run began, in all processes and whenever it is resumed."""

    def began() -> str:
        try:
            date = json.loads((workdir / "config.json").read_text())["date"]
            return datetime.fromisoformat(date).isoformat()
        except (OSError, ImportError, ValueError, KeyError, TypeError):  # a new run, or files that are checked later
            return datetime.now().isoformat(timespec="seconds")

    dates.fix(datetime.fromisoformat(broadcast(began)))


def check_owner(workdir: epath.Path, config: Config) -> bool:
    """Whether the work directory belongs to a run of this config; False: it has no config.json.

    Raises:
      UserError: if it belongs to another run, naming the different fields.
    """
    file = workdir / "config.json"
    if not file.exists():
        return False
    try:
        owner, kind = json.loads(file.read_text()), type(config).__name__
        if owner["kind"] != kind:
            command = _COMMANDS.get(owner["kind"], owner["kind"])
            raise UserError(
                f"{workdir}: it belongs to a run of `{command}`, not of `{_COMMANDS[kind]}`; give a new --workdir"
            )
        before = with_new_fields(kind, owner["config"])
        if fields := ", ".join(different_fields(before, to_json(config))):
            raise UserError(
                f"{workdir}: it belongs to a run with another config ({fields}); give that config, or a new --workdir"
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not the config.json of a run; move it away, or give a new --workdir") from error
    return True


@contextlib.contextmanager
def write_errors(workdir: epath.Path) -> Iterator[None]:
    """Raises UserError for errors that occur when a file is written to the work directory."""
    try:
        yield
    except ImportError as error:  # gs:// needs an additional package
        raise UserError(f"{workdir}: {error}, or give a local --workdir") from error
    except OSError as error:
        raise UserError(f"{workdir}: cannot write there ({error.strerror}); give another --workdir") from error


def _claim(workdir: epath.Path, config: Config) -> dict[str, Any]:
    """Checks and writes config.json; returns the config as JSON values."""
    values = to_json(config)
    record = {"kind": type(config).__name__, "fingerprint": fingerprint(config), "config": values}
    record["date"] = dates.now().isoformat(timespec="seconds")
    part = workdir / "config.json.part"
    with write_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        check_owner(workdir, config)
        part.write_text(json.dumps(record, indent=2) + "\n")
        part.replace(workdir / "config.json")
    return values


def _check_same_everywhere(workdir: epath.Path, config: Config, owner: dict[str, Any]) -> None:
    """Raises UserError unless this process has the config and the work directory of process 0."""
    if fields := ", ".join(different_fields(owner, to_json(config), every=True)):
        raise UserError(f"its config differs from that of process 0 ({fields}); give the same command on every host")
    if not (workdir / "config.json").exists():
        raise UserError(
            f"{workdir}: files that process 0 wrote there are not visible here; give a --workdir that all hosts share, "
            "on a network file system or gs://"
        )
