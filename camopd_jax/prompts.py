"""Prompts that a model writes itself, and a map of what a fine-tune changed over the prompts of a branch.

    python -m camopd_jax.prompts self --model=ORIGINAL --out=data/self --rows=10000
    python -m camopd_jax.prompts map --config=configs/mine.py --out=map.json

self: the model continues an open user turn of its own chat template until the turn ends. Texts that are cut, short,
repetitive, unreadable, duplicates or answers are left out, and so are evaluation questions. The folder gets
manifest.json, as from `data.recipe`, and prompts.jsonl, which is a value for config.branches.recovery.prompts.source.
The same command gives the same prompts. With --clusters, twice as many are written, and those kept are spread over
clusters of the model's hidden states; with --scripts, texts in other scripts are left out.

map: the specialised model answers --answered prompts of a branch, and the divergence from the original at each token
shows for which prompts it has changed most: by --field of the prompts' rows, or by clusters of the original model's
hidden states. The file is a value for config.branches.BRANCH.prompts.weights, by which prompts are drawn in proportion
to the divergence. The work directory of a run with weights="gap" has such a file too.
"""

from pathlib import Path

from absl import flags
from rich.console import Console

from camopd_jax.config.schema import Sampling, TrainConfig
from camopd_jax.data import prompt_map as maps
from camopd_jax.data import prompt_set
from camopd_jax.errors import UserError
from camopd_jax.evals import tasks
from camopd_jax.planning.memory import choose_here
from camopd_jax.runs import prompt_map, self_prompts
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
    flags.DEFINE_integer("seed", 0, "Seed of the sampling.", 0, 2**31 - 1)
    flags.DEFINE_list(
        "against",
        None,
        "Evaluation questions to remove: files or datasets (split test). Default: every benchmark's own dataset, "
        "from the hub. --against= : none.",
    )
    flags.DEFINE_list("scripts", [], "self: scripts of the letters, such as latin,greek; default: any.")
    flags.DEFINE_integer("clusters", 0, "self: spread over this many clusters. map: group by them, not by --field.", 0)
    flags.DEFINE_string("branch", "recovery", "map: the branch whose prompts are mapped.")
    flags.DEFINE_string("field", None, "map: field of a prompt's row that names its group; default: source.")
    flags.DEFINE_integer("answered", prompt_map.ANSWERED, "map: prompts that are answered.", lower_bound=2)
    read_config = cli.config_flag(TrainConfig)

    def main(kind: str) -> None:
        kinds = {self_prompts.NAME: write_prompts, "map": write_map}
        if kind not in kinds:
            raise UserError(f"{kind} is neither of the two kinds {' and '.join(kinds)}")
        kinds[kind](flags.FLAGS)

    def write_map(values: flags.FlagValues) -> None:
        config, out = read_config(), cli.required("out", "map.json")
        settings = prompt_map.MapSettings(values.field, values.clusters, values.answered)
        start(None)
        made = prompt_map.map_branch(choose_here(config), values.branch, settings)
        maps.write(Path(out), made)
        Console(highlight=False).print(prompt_map.table(made))

    def write_prompts(values: flags.FlagValues) -> None:
        model, out = cli.required("model", "ORIGINAL"), Path(cli.required("out", "data/self"))
        sampling = Sampling(temperature=values.temperature, top_p=values.top_p)
        lengths, about = (values.longest, values.shortest), (tuple(values.scripts), values.clusters)
        settings = self_prompts.SelfPrompting(
            model, values.rows, *lengths, sampling, values.system, values.batch_size, values.seed, *about
        )
        given = None if values.against is None else [(source, "test") for source in values.against if source]
        start(None)
        manifest = self_prompts.build(settings, tasks.datasets() if given is None else given, out)
        print(prompt_set.summary(manifest, out))

    cli.run(main, "KIND")
