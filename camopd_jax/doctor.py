"""Checks a config against its models, its prompts and the machine, before a chip-hour is spent.

    python -m camopd_jax.doctor --config=configs/mine.py --workdir=runs/mine
    python -m camopd_jax.doctor --config=configs/medqa.py --topology=v6e:8x8

It meets what a run would meet, but for the steps: config, checkpoints (of the weights the headers alone), tokenizers,
every prompt, benchmarks, mesh, work directory. All problems are shown, not the first alone, and what is odd but would
run; at the end stands a prompt of each branch as the student reads it. No weight is loaded and nothing is written, but
that models and datasets with hub names are fetched. Exit code 2, if anything would end the run.

Whether the run has room and how long it takes: `python -m camopd_jax.plan`.
"""

from absl import flags

from camopd_jax.config.schema import TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.planning import topology
from camopd_jax.planning.doctor import examine, table
from camopd_jax.runtime import cli

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the run, to look at.")
    flags.DEFINE_string("topology", "local", "Devices to check for: local, or as of camopd_jax.plan.")
    read_config = cli.config_flag(TrainConfig)

    def main() -> None:
        config = read_config()
        findings, prompts = examine(config, flags.FLAGS.workdir, topology.describe(flags.FLAGS.topology))
        console = cli.console()
        console.print(table(findings))
        for branch, text in prompts.items():
            console.print(f"\none of the {branch} prompts, as the student reads it:")
            console.print(text, markup=False, soft_wrap=True)
        wrong = sum(finding.kind == "wrong" for finding in findings)
        if wrong:
            raise UserError(f"{wrong} of these would end the run")

    cli.run(main)
