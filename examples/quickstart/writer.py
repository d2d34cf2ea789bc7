"""Makes a copy of the generalist that can write prompts: it learns whole conversations, the users' turns too.

    python examples/quickstart/writer.py runs/writer    # two minutes on 2 CPU cores

The model is in runs/writer/export.

The generalist was trained on answers alone, so what it writes in a user's turn never ends. Published models have read
users' turns in pretraining. The conversations are those of the six skills, in the proportions in which it learnt them.
"""

import json
import random
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from tasks import SKILLS, distinct, questions, skill_row

from camopd_jax.config.schema import Checkpoints, Log, Optimizer, SftConfig, Stream
from camopd_jax.runs.fine_tuning import sft
from camopd_jax.runtime.jsonl import write_rows

HERE = Path(__file__).resolve().parent
HELD_OUT = [*HERE.glob("eval_*covered.jsonl"), *(HERE.parent / "sandbox").glob("*covered.jsonl")]
# An answer that contains the next turns: the loss is on every token after <|user|>
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{% else %}{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
)


def conversations() -> list[dict[str, object]]:
    """10,000 conversations of each skill, in a random order."""
    held_out = questions([json.loads(line) for file in HELD_OUT for line in file.read_text().splitlines()])
    rows: list[dict[str, object]] = []
    for skill in SKILLS:
        for row in distinct(partial(skill_row, skill), 10_000, f"{skill} writer", held_out):
            text = f"{row['messages'][0]['content']}<|end|><|assistant|>{row['answer']}"
            rows.append({"messages": [{"role": "user", "content": "-"}, {"role": "assistant", "content": text}]})
    random.Random(0).shuffle(rows)
    return rows


def main(workdir: Path, scratch: Path) -> None:
    """Fine-tunes the generalist under `TEMPLATE`, and gives the result its own template back."""
    write_rows(scratch / "conversations.jsonl", conversations())
    shutil.copytree(HERE / "generalist", scratch / "generalist")
    settings = scratch / "generalist" / "tokenizer_config.json"
    own = settings.read_text()
    settings.write_text(json.dumps(json.loads(own) | {"chat_template": TEMPLATE}))
    config = SftConfig(
        model=str(scratch / "generalist"),
        data=Stream(source=str(scratch / "conversations.jsonl")),
        steps=800,
        batch_size=64,
        max_tokens=128,
        smallest_bucket=16,
        optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", warmup_steps=20, micro_batch=64),
        checkpoints=Checkpoints(every=1000, keep_last=1, keep_best=0),
        log=Log(trackers=(), report=False),
    )
    sft(config, str(workdir))
    (workdir / "export" / "tokenizer_config.json").write_text(own)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]), Path(folder))
