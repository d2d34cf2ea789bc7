"""Makes all that lies beside it from nothing: data, tokenizer, and the two tiny checkpoints.

    python examples/quickstart/make.py            # about 15 minutes on 2 CPU cores

generalist/  a 3-layer, 96-wide Llama that learnt the six skills of tasks.py
specialist/  its copy, fine-tuned on the invented pharmacopoeia (2 % skills among it): it knows the domain and lost
             much of the skills
../sandbox/  questions for comparisons of methods, in no other file
*.jsonl      proxy prompts (four of the six skills), domain prompts, and questions held out from all training
"""

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from tasks import COVERED, SKILLS, UNCOVERED, Row, distinct, domain_row, questions, skill_row
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from camopd_jax.config.schema import Benchmark, Checkpoints, Evaluation, Log, Optimizer, SftConfig, Stream
from camopd_jax.models import hf
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.models.weights import table
from camopd_jax.runtime.jsonl import write_rows
from camopd_jax.sft import sft

HERE = Path(__file__).resolve().parent
FRESH = HERE.parent / "sandbox"
SPECIAL = ("<|pad|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDF0123456789 +.:?"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HELD_OUT = 96  # questions of each skill; twice as many of the domain


def make_data() -> None:
    """The committed prompts and questions, and here what the two models learn from."""
    held_out, proxy, lessons = [], [], []
    for skill in SKILLS:
        rows = distinct(lambda rng, skill=skill: skill_row(skill, rng), HELD_OUT, f"{skill} held out", set())
        held_out += rows
        taken = questions(rows)
        if skill in COVERED:
            prompts = distinct(lambda rng, skill=skill: skill_row(skill, rng), 400, f"{skill} prompts", taken)
            proxy += [{"messages": row["messages"], "skill": skill} for row in prompts]
        lessons += distinct(lambda rng, skill=skill: skill_row(skill, rng), 20000, f"{skill} lessons", taken)
    domain_held_out = distinct(domain_row, 2 * HELD_OUT, "domain held out", set())
    domain_lessons = distinct(domain_row, 6000, "domain lessons", questions(domain_held_out))
    domain_prompts = [{"messages": row["messages"]} for row in domain_lessons[:1000]]

    rng = random.Random("order")
    rng.shuffle(proxy)
    for name, skills in {"covered": COVERED, "uncovered": UNCOVERED}.items():
        write_rows(HERE / f"eval_{name}.jsonl", [row for row in held_out if row["skill"] in skills])
    write_rows(HERE / "eval_domain.jsonl", [row | {"answer": row["letter"]} for row in domain_held_out])
    write_rows(HERE / "general_prompts.jsonl", proxy)
    write_rows(HERE / "domain_prompts.jsonl", domain_prompts)
    for name, skills in {"covered": COVERED, "uncovered": UNCOVERED}.items():
        write_rows(
            FRESH / f"{name}.jsonl",
            [
                row
                for skill in skills
                for row in fresh(
                    lambda rng, skill=skill: skill_row(skill, rng),
                    400 // len(skills),
                    skill,
                    [*held_out, *proxy, *lessons],
                )
            ],
        )
    rows = fresh(domain_row, 400, "domain", [*domain_held_out, *domain_lessons])
    write_rows(FRESH / "domain.jsonl", [row | {"answer": row["letter"]} for row in rows])
    write_rows("skills.jsonl", lessons)
    write_rows("domain.jsonl", [*domain_lessons, *rng.sample(lessons, 120)])


def fresh(make: Callable[[random.Random], Row], count: int, name: str, seen: list[Row]) -> list[Row]:
    """Questions for the study alone: neither the models nor the people who tuned the quickstart have seen them."""
    rows = distinct(make, count, f"{name} fresh", questions(seen))
    random.Random(name).shuffle(rows)
    return rows


def make_tokenizer(folder: Path) -> None:
    """One token a character; written by hand so that transformers 4 and 5 both read it."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|pad|>", "unk_token": "<|unk|>",
        "eos_token": "<|end|>", "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_newborn(folder: Path) -> None:
    """A model that knows nothing yet."""
    make_tokenizer(folder)
    pad, end = SPECIAL.index("<|pad|>"), SPECIAL.index("<|end|>")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(SPECIAL) + len(CHARACTERS),
        "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 24, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False,
        "mlp_bias": False, "pad_token_id": pad, "bos_token_id": None, "eos_token_id": end, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "generation_config.json").write_text(
        json.dumps({"pad_token_id": pad, "eos_token_id": end}, indent=2) + "\n"
    )
    model = Model(from_hf(config))
    params = model.init(jax.random.key(0))
    names = [row.hf_name.format(i) for row in table(model.config) for i in range(3 if row.stacked else 1)]
    hf.save(folder, params, model.config, config, dict.fromkeys(names, np.dtype(np.float32)))


def lesson(model: str, source: str, steps: int, rate: float, schedule: str, every: int) -> SftConfig:
    def benchmark(name: str, axis: str) -> Benchmark:
        task = "choice" if axis == "domain" else "exact"
        return Benchmark(name, task, str(HERE / f"eval_{name}.jsonl"), axis=axis, max_response_tokens=32)

    return SftConfig(
        model=model,
        data=Stream(source=source),
        steps=steps,
        batch_size=64,
        max_tokens=128,
        smallest_bucket=16,
        optimizer=Optimizer(learning_rate=rate, schedule=schedule, warmup_steps=20, micro_batch=64),
        evaluation=Evaluation(every, batch_size=96, benchmarks=(
            benchmark("covered", "general"), benchmark("uncovered", "general"), benchmark("domain", "domain"))),
        checkpoints=Checkpoints(every=1000, keep_last=1, keep_best=0),
        log=Log(tensorboard=False),
    )  # fmt: skip


def main(scratch: Path) -> None:
    scratch.mkdir(exist_ok=True)
    os.chdir(scratch)  # relative names: the model cards tell of them
    make_data()
    Path("newborn").mkdir(exist_ok=True)
    make_newborn(Path("newborn"))
    sft(lesson("newborn", "skills.jsonl", steps=4000, rate=2e-3, schedule="cosine", every=1000), "generalist")
    sft(lesson("generalist/export", "domain.jsonl", steps=1200, rate=1e-3, schedule="cosine", every=100), "specialist")
    for name in ("generalist", "specialist"):
        shutil.rmtree(HERE / name, ignore_errors=True)
        shutil.copytree(Path(name, "export"), HERE / name)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
