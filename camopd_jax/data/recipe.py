"""Builds a set of prompts: one of the paper's (from the hub or from local copies), or one from your own files.

    python -m camopd_jax.data.recipe medical --out=data/medical
    python -m camopd_jax.data.recipe roleplay --out=data/roleplay --source=coser=coser.jsonl
    python -m camopd_jax.data.recipe general --out=data/general --rows=2000
    python -m camopd_jax.data.recipe jsonl --out=data/mine --source=rows=notes.jsonl --against=eval.jsonl

The same command gives the same files as long as the sources do not change: samples depend only on --seed, and
manifest.json names the revision of each dataset of the hub. The manifest also gives source and licence of every part,
how many rows were kept, and how many were dropped for which reason. Evaluation questions are removed from the prompts:
those of --against, by default all benchmarks that camopd_jax knows.
"""

from pathlib import Path

from absl import flags

from camopd_jax.data import prompt_set
from camopd_jax.data.recipes import RECIPES, resized, with_sources
from camopd_jax.errors import UserError
from camopd_jax.evals import tasks
from camopd_jax.runtime import cli

if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder for the prompts and manifest.json, created if needed.")
    flags.DEFINE_multi_string("source", [], "PART=SOURCE: files or a dataset for a part; repeatable.")
    flags.DEFINE_list(
        "against",
        None,
        "Evaluation questions to remove: files or datasets (split test). Default: every benchmark's own dataset, "
        "from the hub. --against= : none.",
    )
    flags.DEFINE_integer("rows", None, "Total number of prompts, in the recipe's proportions; default: its own.", 1)
    flags.DEFINE_integer("seed", 0, "Seed of the samples.")

    def main(name: str) -> None:
        out = Path(cli.required("out", f"data/{name}"))
        if name not in RECIPES:
            raise UserError(f"{name} is not a recipe; give one of {', '.join(RECIPES)}")
        values = flags.FLAGS
        recipe = resized(with_sources(RECIPES[name], values.source), values.rows)
        given = None if values.against is None else [(source, "test") for source in values.against if source]
        evaluations = tasks.datasets() if given is None else given
        print(prompt_set.summary(prompt_set.build(recipe, name, out, evaluations, values.seed), out))

    cli.run(main, "NAME")
