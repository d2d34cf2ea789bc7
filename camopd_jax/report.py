"""One HTML page of curves and tables, from one run or many: nothing beside the file, no network.

    python -m camopd_jax.report runs/quickstart
    python -m camopd_jax.report runs/sandbox --out=sandbox.html
    python -m camopd_jax.report runs/mine runs/theirs --out=both.html

A DIR is a run's work directory (`train`, `sft`) or that of a grid (`compare`), finished or still in progress. Runs of
one method of a grid are one line, their mean over seeds; runs given by themselves are a line each.
"""

import datetime
from collections.abc import Sequence

from absl import flags

from camopd_jax import cli
from camopd_jax.jsonl import whole_file
from camopd_jax.reporting import directories
from camopd_jax.reporting.page import page


def report(folders: Sequence[str], out: str) -> None:
    """Writes the page.

    Raises:
      UserError: for a directory that is not there or holds no run, and if the page cannot be written.
    """
    text = page(directories.read(folders), datetime.datetime.now().astimezone())
    with whole_file(out) as file:
        file.write(text)


if __name__ == "__main__":
    flags.DEFINE_string("out", "report.html", "File to write; what was there is replaced.")

    def main(*folders: str) -> None:
        report(folders, flags.FLAGS.out)
        print(f"written: {flags.FLAGS.out}")

    cli.run(main, "DIR", many=True)
