"""A grid of runs that differ in method and seed, summarised in one table.

    python -m camopd_jax.compare --config=configs/sandbox.py --workdir=runs/sandbox --seeds=5
    python -m camopd_jax.compare --config=configs/sandbox.py --workdir=runs/sandbox_quick --quick
    python -m camopd_jax.compare --config=configs/smollm2.py --workdir=runs/grid --methods=camopd,vanilla --rates=1e-4

    python -m camopd_jax.compare --list

The methods are those of camopd_jax/config/methods.py, and interpolation between the two models. By default, they are
CaMOPD, its parts and its controls; --methods=all adds those of other papers (docs/objectives.md). Every method is first
run once at each of --rates, with a separate seed. The learning rate with the best sum of recovery and retention on
every fourth question is then used for all seeds; results are on the other questions. A single rate needs no such sweep.

WORKDIR/METHOD/RATE/seed-N is the work directory of a run; its log.txt has the output of the run. If the grid was
stopped, the same command continues it. WORKDIR/study.json holds the table's numbers.
"""

import math

from absl import flags
from rich.console import Console

from camopd_jax.analysis import study
from camopd_jax.config.methods import INTERPOLATION, METHOD_NAMES, METHODS, QUICK, REFERENCE_METHODS, STUDY_METHODS
from camopd_jax.config.schema import TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.runs.grid import compare
from camopd_jax.runs.workers import default_workers
from camopd_jax.runtime import cli

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the grid, created if needed.")
    flags.DEFINE_list("methods", list(STUDY_METHODS), "Methods to compare, as in --list; all: every one.")
    flags.DEFINE_bool("list", False, "Print the methods, with a line about each, and end.")
    flags.DEFINE_list(
        "rates",
        [],
        "Learning rates to choose from, the same for every method. Default: from a quarter to four times the config's.",
    )
    flags.DEFINE_integer("seeds", 5, "Runs of each method.", 1)
    flags.DEFINE_integer("workers", None, "Runs at one time. Default: one per core, or 1 on an accelerator.", 1)
    flags.DEFINE_bool("quick", False, f"Only {', '.join(QUICK)} and {INTERPOLATION}, two seeds, the config's rate.")
    read_config = cli.config_flag(TrainConfig)

    def main() -> None:
        values = flags.FLAGS
        if values.list:
            for name, of in METHODS.items():
                print(f"{name:25} {of.about}")
            print(
                f"{INTERPOLATION:25} of both models' parameters, without training (task arithmetic, arXiv 2212.04089)"
            )
            return
        workdir, base = cli.required("workdir", "runs/sandbox"), read_config()
        methods = (*QUICK, INTERPOLATION) if values.quick else values.methods
        methods = METHOD_NAMES if "all" in methods else tuple(dict.fromkeys(filter(None, methods)))
        if not methods:
            raise UserError(f"--methods names no method; give some of {', '.join(METHOD_NAMES)}")
        for method in methods:
            if method not in METHOD_NAMES:
                raise UserError(f"--methods: {method} is not a method; give some of {', '.join(METHOD_NAMES)}")
        try:
            rates = list(dict.fromkeys(float(rate) for rate in values.rates if rate))
        except ValueError:
            raise UserError(f"--rates={','.join(values.rates)}: give numbers separated by commas") from None
        if not all(0 < rate < math.inf for rate in rates):
            raise UserError(f"--rates={','.join(values.rates)}: give numbers > 0")
        rate = base.optimizer.learning_rate
        rates = [rate] if values.quick else rates or [factor * rate for factor in (0.25, 0.5, 1, 2, 4)]
        workers = values.workers or default_workers()
        facts = compare(base, workdir, methods, rates, 2 if values.quick else values.seeds, workers)
        console = Console(highlight=False)
        notes = {
            method: f"{setting:g}\n{study.cost_note(method, facts)}" for method, setting in facts["settings"].items()
        }
        console.print(study.methods_table(facts["outcomes"], facts["axes"], REFERENCE_METHODS, notes))
        for folder, reason in facts["failed"].items():
            console.print(f"failed: {folder}: {reason}")

    cli.run(main)
