"""One self-contained HTML page of curves and tables, from one run or several.

    python -m camopd_jax.report runs/quickstart
    python -m camopd_jax.report runs/sandbox --out=sandbox.html
    python -m camopd_jax.report runs/mine runs/theirs --out=both.html

Each DIR is the work directory of a run (`train`, `sft`) or of a grid (`compare`), finished or still in progress. In
figures, the runs of one method of a grid form one line, their mean over seeds; every other run has its own line.
"""

from absl import flags

from camopd_jax.reporting.page import write_page
from camopd_jax.runtime import cli

if __name__ == "__main__":
    flags.DEFINE_string("out", "report.html", "File to write; an existing file is replaced.")

    def main(*folders: str) -> None:
        write_page(folders, flags.FLAGS.out)
        print(f"written: {flags.FLAGS.out}")

    cli.run(main, "DIR", repeated=True)
