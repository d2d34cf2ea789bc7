"""Evaluates models on the benchmarks of a config: Hugging Face folders, hub names, or runs.

    python -m camopd_jax.evaluate --config=configs/smollm2.py
    python -m camopd_jax.evaluate --config=configs/smollm2.py --checkpoint=runs/smollm2/export
    python -m camopd_jax.evaluate --config=configs/quickstart.py \\
        --checkpoint=runs/quickstart,runs/quickstart/checkpoints/180

Without --checkpoint it evaluates the config's own models: the general and the specialised one. Each --checkpoint is a
Hugging Face folder, a hub name, a run's work directory (its last checkpoint) or one of its checkpoints. If --workdir
has results of the config's own models, the table shows them too. Prints a table with standard errors, appends to
WORKDIR/eval.jsonl and keeps every answer in WORKDIR/answers. The same command continues a stopped evaluation.
"""

from collections.abc import Callable

from absl import flags
from rich.console import Console

from camopd_jax.config.schema import Config, SftConfig, TrainConfig
from camopd_jax.evals import tables
from camopd_jax.runs.evaluation import evaluate
from camopd_jax.runtime import cli
from camopd_jax.runtime.distributed import is_primary
from camopd_jax.runtime.start import start

if __name__ == "__main__":
    flags.DEFINE_list("checkpoint", [], "Hugging Face folders, hub names, work directories or their checkpoints/STEP.")
    flags.DEFINE_string("workdir", "runs/evaluation", "Directory for eval.jsonl and the answers; may be a run's own.")
    read_config: Callable[[], Config] = cli.config_flag(TrainConfig, SftConfig)
    cli.define_processes()

    def main() -> None:
        config = read_config()
        start(cli.processes())
        models = evaluate(config, flags.FLAGS.checkpoint, flags.FLAGS.workdir)
        console = Console(highlight=False, quiet=not is_primary())
        console.print(tables.accuracies(models))
        console.print(tables.details(models))

    cli.run(main)
