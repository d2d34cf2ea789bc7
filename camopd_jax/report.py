"""One HTML page of curves and tables, from one run or many: nothing beside the file, no network.

    python -m camopd_jax.report runs/quickstart
    python -m camopd_jax.report runs/sandbox --out=sandbox.html
    python -m camopd_jax.report runs/mine runs/theirs --out=both.html

A DIR is a run's work directory (`train`, `sft`) or that of a grid (`compare`), finished or still in progress. Runs of
one method of a grid are one line, their mean over seeds; runs given by themselves are a line each.
"""

from absl import flags

from camopd_jax.reporting.page import write_page
from camopd_jax.runtime import cli

if __name__ == "__main__":
    flags.DEFINE_string("out", "report.html", "File to write; what was there is replaced.")

    def main(*folders: str) -> None:
        write_page(folders, flags.FLAGS.out)
        print(f"written: {flags.FLAGS.out}")

    cli.run(main, "DIR", many=True)
