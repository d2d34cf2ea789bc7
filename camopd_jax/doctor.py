"""Checks a config against its models, its prompts and the machine, before a run.

    python -m camopd_jax.doctor --config=configs/mine.py --workdir=runs/mine
    python -m camopd_jax.doctor --config=configs/medqa.py --topology=v6e:8x8

It checks everything that a run needs before its first step: config, checkpoints (only the headers of the weights),
tokenizers, every prompt, benchmarks, mesh, work directory. It lists all problems ("wrong"), and settings that would run
but are unusual ("odd"), and prints one prompt of each branch as the student reads it. It loads no weights and writes
nothing, except that models and datasets with hub names are downloaded. The exit code is 2 if anything is wrong.

`python -m camopd_jax.plan` shows whether the run fits in memory and how long a step takes.
"""

from absl import flags

from camopd_jax.config.schema import TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.planning import topology
from camopd_jax.planning.doctor import examine, table
from camopd_jax.runtime import cli, progress

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the run, to be checked as well.")
    flags.DEFINE_string("topology", "local", "Devices to check for: local, or a TPU slice such as v6e:8x8.")
    flags.DEFINE_float("hbm_gib", None, "Memory of a device in GiB, instead of the known value.", lower_bound=0)
    flags.DEFINE_alias("hbm-gib", "hbm_gib")
    read_config = cli.config_flag(TrainConfig)

    def main() -> None:
        config = read_config()
        progress.report()
        with progress.work("checking"):
            where = topology.describe(flags.FLAGS.topology, flags.FLAGS.hbm_gib)
            findings, prompts = examine(config, flags.FLAGS.workdir, where)
        console = cli.console()
        console.print(table(findings))
        for branch, text in prompts.items():
            console.print(f"\na prompt of branch {branch}, as the student reads it:")
            console.print(text, markup=False, soft_wrap=True)
        wrong = sum(finding.kind == "wrong" for finding in findings)
        if wrong:
            raise UserError(f"{wrong} of these would stop the run")

    cli.run(main)
