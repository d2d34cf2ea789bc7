"""A first config for your two models and your prompts, with sizes from the data and the memory.

    python -m camopd_jax.init mine --general=ORIGINAL --specialised=FINE_TUNED --domain=data/domain.jsonl
    python -m camopd_jax.init mine --general=ORIGINAL --specialised=ADAPTER --domain=data/domain.jsonl \\
        --general_prompts=data/general.jsonl --hbm_gib=24

It writes the folder mine with config.py, whose comments say where each value is from. If at least 100 rows of a file
give an answer, a tenth of them, at most 200, become the questions of a benchmark; the folder then has a file of them
and one of the other rows. Models are checked as `doctor` does, their weights are not loaded. Without
--general_prompts, the original model writes prompts before the first step. An existing folder is left as it is.
"""

from pathlib import Path

from absl import flags

from camopd_jax.errors import UserError
from camopd_jax.planning import doctor, new_run
from camopd_jax.planning.topology import Topology, absent_gpus, describe
from camopd_jax.runtime import cli, progress

if __name__ == "__main__":
    flags.DEFINE_string("general", None, "Hugging Face folder or hub name of the original model.")
    flags.DEFINE_string("specialised", None, "The same of its fine-tuned version, or of a LoRA adapter (PEFT).")
    flags.DEFINE_string("domain", None, "Prompts of the domain: files with commas between them, or a dataset's name.")
    flags.DEFINE_string("general_prompts", None, "Prompts of what is to come back; default: the original writes them.")
    flags.DEFINE_float("hbm_gib", None, "Memory of a GPU in GiB; default: that of this machine's devices.", 0.01)
    flags.DEFINE_integer("chips", None, "Number of GPUs; default: this machine's devices.", lower_bound=1)

    EXAMPLES = {"general": "models/original", "specialised": "models/mine", "domain": "data/domain.jsonl"}

    def target(hbm_gib: float | None, chips: int | None) -> Topology:
        """The devices of the run: this machine's, or GPUs that need not be here."""
        local = describe("local")
        if hbm_gib is None and chips in (None, len(local.devices)):
            return local
        hbm = local.hbm if hbm_gib is None else hbm_gib * doctor.GIB
        if hbm is None:
            raise UserError(f"--chips={chips}: the memory of these devices is not known; give --hbm_gib as well")
        return absent_gpus(chips or len(local.devices), hbm)

    def main(name: str) -> None:
        general, specialised, domain = (cli.required(flag, example) for flag, example in EXAMPLES.items())
        values, console = flags.FLAGS, cli.console()
        folder = Path(name)
        new_run.check_folder(folder)
        progress.report()
        with progress.work("writing the config"):
            where = target(values.hbm_gib, values.chips)
            request = new_run.Request(folder, general, specialised, domain, values.general_prompts, where)
            written = new_run.write(request)
        for file, text in written.files.items():
            console.print(f"{file}: {text}", markup=False, soft_wrap=True)
        if written.findings:
            console.print(doctor.table(written.findings))
        console.print("\nNext:")
        for command in written.commands:
            console.print(command, markup=False, soft_wrap=True)

    cli.run(main, "NAME")
