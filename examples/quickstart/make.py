"""Makes the files of this folder and of ../sandbox from scratch: data, tokenizer, and the two tiny checkpoints.

    python examples/quickstart/make.py            # about 15 minutes on 2 CPU cores

generalist/  a 3-layer, 96-wide Llama that learnt the six skills of tasks.py
specialist/  a copy of it, fine-tuned on the invented pharmacopoeia (with 2 % questions of the skills): it knows the
             domain and has lost much of the skills
../sandbox/  questions for comparisons of methods, in no other file
*.jsonl      general prompts (four of the six skills), domain prompts (the first 1,000 of 6,000 questions that the
             specialist learnt from; lessons.py writes all), and questions held out from all training
"""

import json
import os
import random
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from tasks import COVERED, SKILLS, UNCOVERED, Maker, Row, distinct, domain_questions, domain_row, questions, skill_row
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from camopd_jax.config.schema import Benchmark, Checkpoints, Evaluation, Log, Optimizer, SftConfig, Stream
from camopd_jax.models import hf
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import table
from camopd_jax.runs.fine_tuning import sft
from camopd_jax.runtime.jsonl import write_rows

HERE = Path(__file__).resolve().parent
SANDBOX = HERE.parent / "sandbox"
SPECIAL = ("<|pad|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDF0123456789 +.:?"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
AXES = {"covered": COVERED, "uncovered": UNCOVERED}
HELD_OUT = 96  # questions of each skill
FRESH = 400  # questions of the sandbox for the covered skills, the uncovered ones and the domain, each


def make_data() -> None:
    """Writes the prompts and questions, and in the current folder what the two models learn from."""
    held_out: list[Row] = []
    proxy: list[Row] = []
    lessons: list[Row] = []
    for skill in SKILLS:
        make = partial(skill_row, skill)
        rows = distinct(make, HELD_OUT, f"{skill} held out", set())
        held_out += rows
        if skill in COVERED:
            prompts = distinct(make, 400, f"{skill} prompts", questions(rows))
            proxy += [{"messages": row["messages"], "skill": skill} for row in prompts]
        lessons += distinct(make, 20000, f"{skill} lessons", questions(rows))
    domain_held_out, domain_lessons = domain_questions()

    rng = random.Random("order")
    rng.shuffle(proxy)
    for name, skills in AXES.items():
        write_rows(HERE / f"eval_{name}.jsonl", [row for row in held_out if row["skill"] in skills])
    write_rows(HERE / "eval_domain.jsonl", with_letters(domain_held_out))
    write_rows(HERE / "general_prompts.jsonl", proxy)
    write_rows(HERE / "domain_prompts.jsonl", [{"messages": row["messages"]} for row in domain_lessons[:1000]])
    write_rows("skills.jsonl", lessons)
    write_rows("domain.jsonl", [*domain_lessons, *rng.sample(lessons, 120)])
    make_sandbox(questions([*held_out, *proxy, *lessons]), questions([*domain_held_out, *domain_lessons]))


def make_sandbox(seen: set[str], seen_of_domain: set[str]) -> None:
    """Writes the sandbox's questions: neither the models nor those who tuned the quickstart have seen them.

    Args:
      seen, seen_of_domain: the questions of all other files.
    """
    for name, skills in AXES.items():
        rows = [row for skill in skills for row in fresh(partial(skill_row, skill), FRESH // len(skills), skill, seen)]
        write_rows(SANDBOX / f"{name}.jsonl", rows)
    write_rows(SANDBOX / "domain.jsonl", with_letters(fresh(domain_row, FRESH, "domain", seen_of_domain)))


def fresh(make: Maker, count: int, name: str, seen: set[str]) -> list[Row]:
    """New questions in a random order."""
    rows = distinct(make, count, f"{name} fresh", seen)
    random.Random(name).shuffle(rows)
    return rows


def with_letters(rows: list[Row]) -> list[Row]:
    """Questions of the domain, answered by the letter alone, as they are graded."""
    return [row | {"answer": row["letter"]} for row in rows]


def make_tokenizer(folder: Path) -> None:
    """One token a character; written by hand so that transformers 4 and 5 both read it."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "unk_token": "<|unk|>",
        "eos_token": "<|end|>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_untrained(folder: Path) -> None:
    """A model of random weights, with its tokenizer."""
    folder.mkdir(exist_ok=True)
    make_tokenizer(folder)
    pad, end = SPECIAL.index("<|pad|>"), SPECIAL.index("<|end|>")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(SPECIAL) + len(CHARACTERS),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 24,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "pad_token_id": pad,
        "bos_token_id": None,
        "eos_token_id": end,
        "torch_dtype": "float32",
    }
    generation = json.dumps({"pad_token_id": pad, "eos_token_id": end}, indent=2)
    (folder / "generation_config.json").write_text(generation + "\n")
    model = Model(from_hf(config))
    params = model.init(jax.random.key(0))
    names = [row.hf_name.format(i) for row in table(model.config) for i in range(3 if row.stacked else 1)]
    hf.save(folder, params, model.config, config, dict.fromkeys(names, np.dtype(np.float32)))


def lesson(model: str, source: str, steps: int, learning_rate: float, every: int) -> SftConfig:
    """A fine-tuning run, evaluated after every `every` steps."""

    def benchmark(name: str, axis: Literal["general", "domain"]) -> Benchmark:
        task = "choice" if axis == "domain" else "exact"
        return Benchmark(name, task, str(HERE / f"eval_{name}.jsonl"), axis=axis, max_response_tokens=32)

    benchmarks = (benchmark("covered", "general"), benchmark("uncovered", "general"), benchmark("domain", "domain"))
    return SftConfig(
        model=model,
        data=Stream(source=source),
        steps=steps,
        batch_size=64,
        max_tokens=128,
        smallest_bucket=16,
        optimizer=Optimizer(learning_rate=learning_rate, schedule="cosine", warmup_steps=20, micro_batch=64),
        evaluation=Evaluation(every, batch_size=96, benchmarks=benchmarks),
        checkpoints=Checkpoints(every=1000, keep_last=1, keep_best=0),
        log=Log(trackers=()),
    )


def main(scratch: Path) -> None:
    """Makes everything, with the runs and the untrained model in the folder `scratch`."""
    scratch.mkdir(exist_ok=True)
    os.chdir(scratch)  # model cards name the relative paths below
    make_data()
    make_untrained(Path("newborn"))
    sft(lesson("newborn", "skills.jsonl", steps=4000, learning_rate=2e-3, every=1000), "generalist")
    sft(lesson("generalist/export", "domain.jsonl", steps=1200, learning_rate=1e-3, every=100), "specialist")
    for name in ("generalist", "specialist"):
        shutil.rmtree(HERE / name, ignore_errors=True)
        shutil.copytree(Path(name, "export"), HERE / name)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
