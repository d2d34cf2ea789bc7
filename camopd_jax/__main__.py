"""All commands under one name: `camopd train ...` is `python -m camopd_jax.train ...`.

camopd                  lists the commands
camopd train --help     explains one
"""

import ast
import difflib
import re
import runpy
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent


def commands() -> dict[str, str]:
    """The first line of what each command says of itself, by name; nothing is imported."""
    summaries = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text()
        if re.search(r"^    cli\.(run|report_errors)\(main", text, re.MULTILINE):
            name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
            summaries[name] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return summaries


def main() -> None:
    """Runs the command that the first argument names; without one, lists them all."""
    name, *arguments = sys.argv[1:] or ["--help"]
    summaries = commands()
    if name in summaries:
        sys.argv = [f"camopd {name}", *arguments]
        runpy.run_module(f"camopd_jax.{name}", run_name="__main__", alter_sys=True)
    elif name in ("-h", "--help"):
        width = max(map(len, summaries))
        print("\n".join(f"camopd {name:{width}}  {summary}" for name, summary in summaries.items()))
    else:
        near = difflib.get_close_matches(name, summaries, n=1)
        hint = f"did you mean {near[0]}?" if near else "`camopd` lists the commands"
        print(f"error: {name!r} is not a command; {hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
