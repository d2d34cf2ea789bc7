"""Writes a run's model as a Hugging Face folder that transformers loads.

    python -m camopd_jax.export --workdir=runs/medqa --out=recovered
    python -m camopd_jax.export --workdir=runs/medqa --out=recovered --step=110
    python -m camopd_jax.export --workdir=runs/medqa --out=recovered --best
    python -m camopd_jax.export --workdir=runs/medqa --out=recovered --merge
    python -m camopd_jax.export --workdir=runs/medqa --out=recovered --push=ORGANISATION/NAME

The folder holds the configuration, tokenizer, chat template and generation settings of the model the
run started from, the trained weights as sharded safetensors in that model's dtypes, and a model card
that names their sources. A run exports its last or best checkpoint to workdir/export by itself.
Of a run that trains an adapter, it is a PEFT folder; with --merge, the whole model.

With --push, the folder is uploaded to the Hugging Face hub as well, into a private repository that is created if
needed. The token is that of HF_TOKEN or of `hf auth login`.
"""

from pathlib import Path

from absl import flags
from etils import epath

from camopd_jax.errors import UserError
from camopd_jax.runs.export import restore_model, write_folder
from camopd_jax.runs.hub import check_push, push
from camopd_jax.runtime import cli
from camopd_jax.runtime.distributed import is_primary, run_on_all
from camopd_jax.runtime.start import start


def main() -> None:
    values = flags.FLAGS
    workdir, out = cli.required("workdir", "runs/medqa"), cli.required("out", "recovered")
    if values.push and "://" in out:
        raise UserError(f"--push uploads from a local folder, but --out is {out}; give one")
    start(cli.processes())
    if epath.Path(out).exists():
        raise UserError(f"--out: {out} exists; give a new folder")
    if values.push:
        run_on_all(lambda: check_push(values.push) if is_primary() else None)
    loaded, provenance, record = restore_model(workdir, values.step, values.best, values.merge)
    write_folder(epath.Path(out), loaded, provenance, record)
    if is_primary():
        print(f"exported step {provenance['steps']}: {out}")
        if values.push:
            print(f"pushed: {push(Path(out), values.push, values.public)}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    flags.DEFINE_string("out", None, "Folder to write; must not exist.")
    flags.DEFINE_integer("step", None, "Checkpoint to export; default: the last.")
    flags.DEFINE_bool("best", False, "Export the best of the evaluated checkpoints.")
    flags.DEFINE_bool("merge", False, "Merge a trained adapter into its base model.")
    flags.DEFINE_string("push", None, "Repository of the Hugging Face hub to upload to, as ORGANISATION/NAME.")
    flags.DEFINE_bool("public", False, "With --push: create a public repository.")
    cli.define_processes()
    cli.run(main)
