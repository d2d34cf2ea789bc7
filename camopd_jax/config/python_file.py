"""Config files in Python: `get_config()` returns a ConfigDict."""

import importlib.util
import traceback
from pathlib import Path

import ml_collections

from camopd_jax.errors import UserError


def read_python(name: str) -> ml_collections.ConfigDict:
    """What get_config() of a Python file returns, locked against further fields.

    Args:
      name: the file; text after a colon is an argument for get_config().

    Raises:
      UserError: naming the file, and the line of what fails in it.
    """
    file, *argument = name.split(":", 1)
    if not Path(file).is_file():
        raise UserError(f"--config: no config file {file}; give one, for example configs/quickstart.py")
    spec = importlib.util.spec_from_file_location("config_file", file)
    if not file.endswith(".py") or spec is None or spec.loader is None:
        raise UserError(f"--config: {file} is no config file; give one whose name ends with .py, .yaml or .json")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{file}: no function get_config(); define one that returns the config")
        config = module.get_config(*argument)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        raise UserError(f"{file}{_line(error, file)}: the config file fails: {kind}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        kind = type(config).__name__
        raise UserError(
            f"{file}: get_config() returns {kind}; it must return a ConfigDict, as default(TrainConfig) gives"
        )
    config.lock()
    return config


def _line(error: BaseException, file: str) -> str:
    """ ":LINE" of the file where an error was raised, if it is known."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}" if error.filename == file else ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f":{lines[-1]}" if lines else ""
