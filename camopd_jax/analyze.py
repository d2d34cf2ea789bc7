"""Coherence and conflict of the branches' gradients, and what the selection correlates with.

    python -m camopd_jax.analyze --config=configs/quickstart.py
    python -m camopd_jax.analyze --config=configs/quickstart.py --checkpoint=runs/quickstart --out=analysis.jsonl
    python -m camopd_jax.analyze --config=configs/smollm2.py --checkpoint=runs/smollm2/checkpoints/12 \\
        --config.diagnostics.sketch=4095

--checkpoint is a Hugging Face folder, a run's work directory (its last checkpoint) or one of its checkpoints; the
default is the specialised model, from which every run starts. The model answers `config.diagnostics.rows` prompts of
each branch. Tables show how far the answers' gradients agree, how far the branches conflict, and how the gap mass
correlates with length, truncation, entropy, difficulty and prompt source. If the checkpoint belongs to a run with a
selection.jsonl, the correlations over all steps of the run follow. --out appends all figures as a line of JSON.
"""

from absl import flags
from etils import epath
from rich.console import Console

from camopd_jax.analysis import tables
from camopd_jax.config.schema import TrainConfig
from camopd_jax.planning.memory import choose_here
from camopd_jax.runs.analysis import analyze
from camopd_jax.runtime import cli
from camopd_jax.runtime.distributed import is_primary
from camopd_jax.runtime.jsonl import append_rows
from camopd_jax.runtime.start import start

if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Hugging Face folder, work directory of a run, or its checkpoints/STEP.")
    flags.DEFINE_string("source_field", "source", "Field of a prompt's row that names its source.")
    flags.DEFINE_string("out", None, "JSONL file to which the figures are appended as one line.")
    read_config = cli.config_flag(TrainConfig)
    cli.define_processes()

    def main() -> None:
        values, config = flags.FLAGS, read_config()
        start(cli.processes())
        row = analyze(choose_here(config), values.checkpoint, values.source_field)
        if values.out and is_primary():
            append_rows(epath.Path(values.out), [row | {"checkpoint": values.checkpoint or config.specialised_model}])
        console = Console(highlight=False, quiet=not is_primary())
        for table in tables.diagnosis_tables(row):
            console.print(table)

    cli.run(main)
