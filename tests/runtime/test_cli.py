"""How commands end: one line for what a user can mend, a traceback for all else."""

import pytest

from camopd_jax.errors import UserError
from camopd_jax.runtime import cli


def ends(error, capsys):
    """The exit code and what is on stderr."""

    def act():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.report_errors(act)
    return ended.value.code, capsys.readouterr().err


def test_a_users_mistake_is_one_line(capsys):
    assert ends(UserError("file:3: no\n prompt"), capsys) == (2, "error: file:3: no prompt\n")


@pytest.mark.parametrize(
    ("error", "name", "what"),
    [
        (ModuleNotFoundError("No module named 'lm_eval.api'"), "lm_eval", "'camopd_jax[eval]'"),
        (ModuleNotFoundError("No module named 'openai'"), "openai", "'camopd_jax[eval]'"),
        (ModuleNotFoundError("No module named 'matplotlib'"), "matplotlib", "'camopd_jax[bench]'"),
        (ImportError("Please install gcsfs to access Google Storage"), "gcsfs", "gcsfs"),  # as fsspec raises it
        (ImportError("Install s3fs to access S3"), "s3fs", "s3fs"),
    ],
)
def test_an_optional_package_that_is_missing_is_one_line(error, name, what, capsys):
    assert ends(error, capsys) == (2, f"error: the package {name} is not installed; pip install {what}\n")


def test_other_imports_that_fail_are_no_users_mistake():
    with pytest.raises(ImportError, match="camopd_jax.nothing"):
        cli.report_errors(lambda: __import__("camopd_jax.nothing"))
