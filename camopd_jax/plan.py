"""Memory, time and collectives of a run on chips that may be absent, and whether it fits.

    python -m camopd_jax.plan --config=configs/medqa.py --topology=v5e:16x16 --search
    python -m camopd_jax.plan --config=configs/medqa.py --topology=v6e:8x8 --general_config=qwen3-8b \\
        --specialised_config=qwen3-8b --config.rollout.max_response_tokens=8192 --json=plan.json

Every program of the run is compiled by the TPU compiler (pip install 'camopd_jax[plan]') at the run's largest shapes.
Only the config.json of each model is read, no weights. --topology=local plans for this machine's devices.
"""

import dataclasses
import json
from typing import Any

from absl import flags

from camopd_jax.config.schema import TrainConfig
from camopd_jax.models.shapes import SHAPES
from camopd_jax.planning import topology
from camopd_jax.planning.automatic import choose
from camopd_jax.planning.memory import device_memory
from camopd_jax.planning.report import KINDS, Request, look_for, read_models, report
from camopd_jax.runtime import cli
from camopd_jax.runtime.jsonl import atomic_file

if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "Chips to plan for, such as v5e:8x8, v6e:4x4, v5p:4x4x4, v4:2x2x4; or local.")
    flags.DEFINE_float("hbm_gib", None, "Memory of a chip in GiB, instead of the known value.", lower_bound=0)
    flags.DEFINE_alias("hbm-gib", "hbm_gib")
    flags.DEFINE_string("general_config", None, f"config.json of the original model, or one of {', '.join(SHAPES)}.")
    flags.DEFINE_string("specialised_config", None, "The same for the specialised model.")
    flags.DEFINE_integer("answer_tokens", None, "Answer length for the seconds; default: the cap.", lower_bound=1)
    flags.DEFINE_list("programs", list(KINDS), "Programs to compile. Decoding with many layers takes minutes.")
    flags.DEFINE_bool("search", False, "Search for a mesh, concurrency, micro-batch, remat and offload that fit.")
    flags.DEFINE_integer("tries", 3, "Candidates that --search compiles at most.", lower_bound=1)
    flags.DEFINE_string("json", None, "File for all results as JSON.")
    read_config = cli.config_flag(TrainConfig)

    def main() -> None:
        values = flags.FLAGS
        name = cli.required("topology", "v5e:8x8")
        config = read_config()
        cap = config.rollout.max_response_tokens
        models = read_models(config, values.general_config, values.specialised_config)
        where, console = topology.describe(name, values.hbm_gib), cli.console()
        choice = choose(config, models, where.devices, where.hbm or device_memory())
        if choice.values:
            console.print(str(choice))
        request = Request(
            config=choice.config,
            models=models,
            topology=where,
            answer=min(values.answer_tokens or cap, cap),
            wanted=tuple(values.programs),
            console=console,
        )
        result: dict[str, Any] = {"config": dataclasses.asdict(choice.config)}
        result |= look_for(request, values.tries) if values.search else report(request)
        if values.json:
            with atomic_file(values.json) as file:
                file.write(json.dumps(result, indent=1) + "\n")

    cli.run(main)
