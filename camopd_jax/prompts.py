"""Prompts that a model writes itself, for the branch whose teacher it is.

    python -m camopd_jax.prompts self --model=ORIGINAL --out=data/self --rows=10000

The model continues an open user turn of its own chat template until the turn ends. Texts that are cut, short,
repetitive, unreadable, duplicates or answers are left out, and so are evaluation questions. The folder gets
manifest.json, as from `data.recipe`, and prompts.jsonl, which is a value for config.branches.recovery.prompts.source.
The same command gives the same prompts.
"""

from pathlib import Path

from absl import flags

from camopd_jax.config.schema import Sampling
from camopd_jax.data import prompt_set
from camopd_jax.errors import UserError
from camopd_jax.evals import tasks
from camopd_jax.runs import self_prompts
from camopd_jax.runtime import cli
from camopd_jax.runtime.start import start

if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face folder or hub name of the original model.")
    flags.DEFINE_string("out", None, "Folder for the prompts and manifest.json, created if needed.")
    flags.DEFINE_integer("rows", 10_000, "Prompts to write.", lower_bound=1)
    flags.DEFINE_integer("longest", 512, "Longest prompt in tokens; longer texts are dropped.", lower_bound=1)
    flags.DEFINE_integer("shortest", 3, "Shortest prompt in words.", lower_bound=1)
    flags.DEFINE_float("temperature", 1.0, "Sampling temperature.", lower_bound=1e-3)
    flags.DEFINE_float("top_p", 1.0, "Sample from the most likely tokens up to this probability; 1: off.", 0.0, 1.0)
    flags.DEFINE_string("system", None, "System prompt before the user's turn.")
    flags.DEFINE_integer("batch_size", 64, "Prompts written at one time.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the sampling.", 0)
    flags.DEFINE_list(
        "against",
        None,
        "Evaluation questions to remove: files or datasets (split test). Default: every benchmark's own dataset, "
        "from the hub. --against= : none.",
    )

    def main(kind: str) -> None:
        if kind != self_prompts.NAME:
            raise UserError(f"{kind} is not a kind of prompts; give {self_prompts.NAME}")
        values = flags.FLAGS
        model, out = cli.required("model", "ORIGINAL"), Path(cli.required("out", "data/self"))
        sampling = Sampling(temperature=values.temperature, top_p=values.top_p)
        settings = self_prompts.SelfPrompting(
            model, values.rows, values.longest, values.shortest, sampling, values.system, values.batch_size, values.seed
        )
        given = None if values.against is None else [(source, "test") for source in values.against if source]
        start(None)
        manifest = self_prompts.build(settings, tasks.datasets() if given is None else given, out)
        print(prompt_set.summary(manifest, out))

    cli.run(main, "KIND")
