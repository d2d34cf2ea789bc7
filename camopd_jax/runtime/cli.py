"""Flags, config files and error handling of all commands. Does not need JAX."""

import dataclasses
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import absl.logging
import ml_collections
from absl import app, flags
from ml_collections import config_flags

from camopd_jax.config.build import make_room, with_fields
from camopd_jax.config.consistency import from_config_dict
from camopd_jax.config.python_file import read_python
from camopd_jax.config.schema import MOVED
from camopd_jax.config.yaml_file import SUFFIXES as YAML
from camopd_jax.config.yaml_file import read_yaml
from camopd_jax.errors import UserError
from camopd_jax.runtime.termination import in_cluster, terminate

if TYPE_CHECKING:
    from rich.console import Console

    from camopd_jax.runtime.cluster import Processes

_OPTIONAL = {  # packages that not all commands need, and what installs them
    **dict.fromkeys(("lm_eval", "langdetect", "nltk", "immutabledict", "openai"), "'camopd_jax[eval]'"),
    "libtpu": "'camopd_jax[plan]'",
    "matplotlib": "'camopd_jax[bench]'",
    **{name: name for name in ("gcsfs", "s3fs", "torch")},
}

C = TypeVar("C")
T = TypeVar("T")


def config_flag(*classes: type[C]) -> Callable[[], C]:
    """Defines `--config=FILE` and `--config.FIELD=VALUE`; returns a function that reads and checks the config.

    Of several classes, the first one that has all fields of the config is used; if none has, the first one.
    """
    names = " or a ".join(cls.__name__ for cls in classes)
    about = f"YAML or JSON file with the fields of a {names}, or Python file whose get_config() returns one."
    holder = config_flags.DEFINE_config_file("config", None, about)
    flags.FLAGS["config"].parser = _ConfigParser(classes)

    def read() -> C:
        if holder.value is None:
            raise UserError("--config is missing; give a config file, for example --config=configs/quickstart.py")
        return from_config_dict(_class_of(holder.value, classes), holder.value)

    return read


def _class_of(config: Iterable[str], classes: Sequence[type[C]]) -> type[C]:
    fields = set(config)
    return next((c for c in classes if fields <= _fields(c)), classes[0])


def _fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


class _ConfigParser(flags.ArgumentParser[Any]):
    """Reads a config file, and prepares the config for the `--config.FIELD=VALUE` of the command line."""

    def __init__(self, classes: Sequence[type]):
        self._classes = classes

    def parse(self, path: str) -> ml_collections.ConfigDict:
        if sum(argument.split("=")[0] in ("--config", "-config") for argument in sys.argv) > 1:
            raise UserError("--config is given twice; give one config file, and single fields as --config.FIELD=VALUE")
        config = self._read_yaml(Path(path)) if path.endswith(YAML) else read_python(path)
        for argument in sys.argv:
            flag, _, value = argument.partition("=")
            if re.match(r"--?(no)?config\.", flag):
                names = flag.split(".")[1:]
                if not all(name.isidentifier() for name in names):
                    raise UserError(
                        f"{flag} is not the name of a field, which has letters, digits and _ between dots; a field of "
                        "a list is set in the config file"
                    )
                make_room(_class_of(config, self._classes), config, names, value == "None")
        return config

    def _read_yaml(self, file: Path) -> ml_collections.ConfigDict:
        try:
            fields = read_yaml(file)
        except OSError as error:
            advice = "give a config file, for example configs/quickstart.py"
            raise UserError(f"--config: cannot read {file} ({error.strerror}); {advice}") from error
        return with_fields(_class_of(fields, self._classes), fields)


_PROCESS_FLAGS = ("coordinator_address", "num_processes", "process_id")


def define_processes(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags that `processes` reads."""
    address, count, number = _PROCESS_FLAGS
    where = "For several processes outside Cloud TPU:"
    flags.DEFINE_string(address, None, f"{where} host of process 0 and a free port on it, as host:port.", values)
    flags.DEFINE_integer(count, None, f"{where} their number.", flag_values=values)
    flags.DEFINE_integer(number, None, f"{where} the number of this one, from 0.", flag_values=values)


def processes(values: flags.FlagValues = flags.FLAGS) -> "Processes | None":
    """The values of the flags for several processes; None if they are not set."""
    from camopd_jax.runtime.cluster import Processes  # imports JAX, which not all commands need

    given: dict[str, Any] = {name: values[name].value for name in _PROCESS_FLAGS}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise UserError(f"{missing[0]} is missing; give all three of --{', --'.join(given)}, or none of them")
    address, count, number = given.values()
    return Processes(address, count, number)


def run(main: Callable[..., None], *words: str, repeated: bool = False) -> None:
    """Parses the flags and runs `main`. A user's mistake becomes one line on stderr and exit code 2.

    Args:
      words: names of the positional arguments; `main` gets their values.
      repeated: whether the last one may be given more than once.
    """
    _configure_logging()
    app.run(
        lambda argv: report_errors(lambda: main(*argv[1:])),
        flags_parser=lambda argv: report_errors(lambda: _parse(argv, words, repeated)),
    )


def _configure_logging() -> None:
    """Prints only warnings of libraries. `--verbosity=0` shows more."""
    absl.logging.set_verbosity(absl.logging.WARNING)
    # Orbax logs an error with its traceback before it raises it; `report_errors` prints it as one line.
    logging.getLogger("absl").addFilter(lambda record: not ("orbax" in record.pathname and record.exc_info))


def console() -> "Console":
    """The console for a command's tables, with the terminal's width or else 120 columns."""
    from rich.console import Console  # slow to import, and not all commands need it

    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def required(name: str, example: str) -> str:
    """The value of a required string flag."""
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name} is missing; for example --{name}={example}")
    return value


def _parse(argv: list[str], words: Sequence[str], repeated: bool) -> list[str]:
    # As in --workdir=~/runs, where a shell leaves it
    argv = [re.sub(r"^(--?[\w.]+=)~(?=/|$)", rf"\1{os.path.expanduser('~')}", argument) for argument in argv]
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(f"{error}; see --help") from error
    except AttributeError as error:  # from ml_collections: an override of an unknown field
        raise UserError(_unknown_field(argv, str(error))) from error
    except SystemExit:  # absl ends --help with 1
        sys.exit(0)
    except KeyError as error:  # from ml_collections: an override in an unknown block
        raise UserError(_unknown_field(argv, str(error))) from error
    except (OSError, ImportError, SyntaxError, TypeError, ValueError, NameError) as error:
        raise UserError(f"--config.FIELD=VALUE: a value cannot be read: {_cause(error)}") from error
    if len(rest) > 1 + len(words) and not repeated:
        raise UserError(f"{rest[1 + len(words)]!r} is not a flag; flags begin with --")
    if len(rest) < 1 + len(words):
        raise UserError(f"{words[len(rest) - 1]} is missing; see --help")
    return rest


def _unknown_field(argv: Sequence[str], message: str) -> str:
    """The error message for an override of an unknown field, from ml_collections' message."""
    words = re.findall(r"\w+", message)
    field = words[0] if words else ""
    name = next((argument.split("=")[0] for argument in argv if field in argument), field)
    near = re.search(r'Did you mean "(\w+)"', message)
    hint = f"did you mean {near[1]}?" if near else "camopd_jax/config/schema.py lists the fields"
    if field in MOVED:
        hint = f"it is now config.{MOVED[field]}"
    return f"{name} is not a field of the config; {hint}"


def _cause(error: BaseException) -> str:
    """The first error of a chain; ml_collections wraps errors in its own."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return f"{type(error).__name__}: {error}"


def report_errors(act: Callable[[], T]) -> T:
    """Calls `act`; a user's mistake becomes one line on stderr and exit code 2.

    So does an optional package that is not installed: fsspec, for one, imports that of a bucket when a path is read.
    """
    try:
        return act()
    except UserError as error:
        _end(str(error))
    except KeyboardInterrupt:
        terminate(128 + signal.SIGINT)
    except Exception as error:
        words = re.findall(r"\w+", str(error)) if isinstance(error, ImportError) else []
        if name := next((word for word in words if word in _OPTIONAL), None):
            _end(f"the package {name} is not installed; pip install {_OPTIONAL[name]}")
        if not in_cluster():
            raise
        terminate(1, error)


def _end(message: str) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    terminate(2)
