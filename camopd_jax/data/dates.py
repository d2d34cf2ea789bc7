"""The date in chat templates (`strftime_now`): one for all prompts of a run, also when it is resumed on another day."""

import re
from datetime import datetime

_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_fixed: datetime | None = None  # None: the computer's clock


def fix(moment: datetime | None) -> None:
    """Sets the time for this process; None: the computer's clock."""
    global _fixed
    _fixed = moment


def now() -> datetime:
    return _fixed or datetime.now()


def with_date(template: str) -> str:
    """A chat template with the date in place of its calls of `strftime_now`, for which transformers reads the clock."""
    return _CALL.sub(lambda call: repr(now().strftime(call[2])), template)
