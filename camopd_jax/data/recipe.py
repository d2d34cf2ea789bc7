"""Builds a set of prompts: the paper's, from the hub or from local copies, or one's own.

    python -m camopd_jax.data.recipe medical --out=data/medical
    python -m camopd_jax.data.recipe roleplay --out=data/roleplay --source=coser=coser.jsonl
    python -m camopd_jax.data.recipe general --out=data/general --rows=2000
    python -m camopd_jax.data.recipe jsonl --out=data/mine --source=rows=notes.jsonl --against=eval.jsonl

The same command gives the same files: a sample is drawn by --seed, and a dataset of the hub is read at the revision
that manifest.json names. The manifest gives source, revision and licence of every part, the rows that were kept, and
those that were not and why. No prompt is among the questions of an evaluation: those of --against, by default all
benchmarks that camopd_jax knows.
"""

from pathlib import Path

from absl import flags

from camopd_jax.data import prompt_set
from camopd_jax.data.recipes import RECIPES, resized, with_sources
from camopd_jax.errors import UserError
from camopd_jax.evals import tasks
from camopd_jax.runtime import cli

if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder for the prompts and manifest.json, made if it does not exist.")
    flags.DEFINE_multi_string("source", [], "PART=SOURCE: other files or another dataset for a part; may come again.")
    flags.DEFINE_list(
        "against",
        None,
        "Evaluation questions: files or datasets (their split test). Default: every benchmark's own dataset, from the "
        "hub. --against= : none.",
    )
    flags.DEFINE_integer("rows", None, "Prompts in all, in the recipe's proportions. Default: the recipe's.", 1)
    flags.DEFINE_integer("seed", 0, "Of the sample.")

    def main(name: str) -> None:
        out = Path(cli.required("out", f"data/{name}"))
        if name not in RECIPES:
            raise UserError(f"no recipe {name}; there are {', '.join(RECIPES)}")
        values = flags.FLAGS
        recipe = resized(with_sources(RECIPES[name], values.source), values.rows)
        given = None if values.against is None else [(source, "test") for source in values.against if source]
        evaluations = tasks.datasets() if given is None else given
        print(prompt_set.summary(prompt_set.build(recipe, name, out, evaluations, values.seed), out))

    cli.run(main, "NAME")
