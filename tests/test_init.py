"""`init`: a first config for two models and a file of prompts, which `doctor` and `train` take as it is."""

import dataclasses
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from quickstart import QUICKSTART, one_line
from rows import chat_row, edit_json, read_lines, write_lines
from safetensors.numpy import load_file, save_file

from camopd_jax.config.consistency import from_config_dict
from camopd_jax.config.schema import TrainConfig
from camopd_jax.data.templates import Reader, Tokenizers, load_tokenizer
from camopd_jax.errors import UserError
from camopd_jax.method.setup import resolve
from camopd_jax.planning import doctor, new_run, topology
from camopd_jax.planning.arrays import read_folders
from camopd_jax.planning.costs import memory_estimate
from camopd_jax.planning.survey import find_task, hold_out, survey

ROOT = Path(__file__).parents[1]
MODELS = {"general": str(QUICKSTART / "generalist"), "specialised": str(QUICKSTART / "specialist")}
GIB = 2**30


WHERE = topology.absent_gpus(1, GIB)


def request(folder, where=WHERE, **changes):
    fields = MODELS | {"domain": str(QUICKSTART / "eval_domain.jsonl"),
                       "general_prompts": str(QUICKSTART / "general_prompts.jsonl")} | changes  # fmt: skip
    return new_run.Request(folder, where=where, **fields)


def load(file):
    return from_config_dict(TrainConfig, runpy.run_path(str(file))["get_config"]())


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A file of 9 prompts, for steps of 8."""
    rows = read_lines(QUICKSTART / "general_prompts.jsonl")[:9]
    return str(write_lines(tmp_path_factory.mktemp("few") / "few.jsonl", rows))


def test_the_config_loads_and_passes_doctor(tmp_path):
    """Questions are held out, and are not among the prompts; the method is the recipe's, the sizes are the data's."""
    general = write_lines(tmp_path / "general.jsonl", read_lines(QUICKSTART / "general_prompts.jsonl")[:70])
    written = new_run.write(request(tmp_path / "mine", general_prompts=str(general)))
    assert sorted(file.name for file in written.files) == ["config.py", "domain_prompts.jsonl", "domain_test.jsonl"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["general.jsonl", "mine"]
    prompts, questions = (read_lines(tmp_path / "mine" / f"domain_{kind}.jsonl") for kind in ("prompts", "test"))
    texts = [{row["messages"][0]["content"] for row in rows} for rows in (prompts, questions)]
    assert len(questions) == 19 and len(prompts) == 192 - 19 and not texts[0] & texts[1]

    config = load(tmp_path / "mine" / "config.py")
    findings, _ = doctor.examine(config, None, dataclasses.replace(WHERE, chip=topology.CHIPS["v6e"]))
    assert [one.text for one in findings if one.kind == "wrong"] == []
    assert written.findings == [one for one in findings if one.kind == "odd"]
    assert config.rollout.batch_size == 64 and config.optimizer.micro_batch == 8
    assert config.rollout.max_prompt_tokens == 64  # the longest has 45 tokens
    assert config.rollout.max_response_tokens == 256 - 64  # the models' maximum: a letter says nothing of the length
    (benchmark,) = config.evaluation.benchmarks
    assert (benchmark.task, benchmark.axis) == ("choice", "domain")
    assert config.optimizer.learning_rate == 2e-4 and config.adapter is None
    assert written.commands == [
        f"python -m camopd_jax.{name} --config={tmp_path / 'mine' / 'config.py'} --workdir=runs/mine"
        for name in ("doctor", "train")
    ]
    recipe = load(ROOT / "configs" / "recover.py")
    assert config.start == recipe.start and config.warm_up == recipe.warm_up and config.steps == recipe.steps
    assert config.optimizer.schedule == recipe.optimizer.schedule
    for name, branch in recipe.branches.items():
        assert dataclasses.replace(config.branches[name], prompts=branch.prompts) == branch
    with pytest.raises(UserError, match="mine exists already, and nothing in it was changed"):
        new_run.write(request(tmp_path / "mine"))


def test_memory_decides_about_sizes_and_adapter(tmp_path, few):
    """By the plan's estimate, below nine tenths of the memory; a model too large to train gets an adapter."""
    folders = {name: Path(folder) for name, folder in MODELS.items()}
    chosen = {}
    for gib in (1, 0.008):
        where = topology.absent_gpus(1, gib * GIB)
        chosen[gib] = config = new_run.make_draft(request(tmp_path / "mine", where, domain=few)).config
        setup = resolve(config, where.devices)
        assert max(memory_estimate(setup, read_folders(config, folders, setup.context)).values()) <= 0.9 * gib * GIB
    assert (chosen[1].adapter, chosen[1].rollout.concurrency, chosen[1].optimizer.micro_batch) == (None, 0, 8)
    # 20 bytes for each of 0.3M parameters, and 2 for the copy that answers
    assert chosen[0.008].adapter is not None and chosen[0.008].optimizer.learning_rate == 2e-3
    assert chosen[0.008].optimizer.micro_batch < 8
    with pytest.raises(UserError, match=r"needs about .* GiB on each device, even with an adapter"):
        new_run.make_draft(request(tmp_path / "mine", topology.absent_gpus(1, 1e6), domain=few))


def test_answers_of_the_rows_give_their_length_and_their_grader(tmp_path):
    """The length is that of the 99th percentile, in tokens of one letter, and one for the end of the answer."""
    reader = Reader(load_tokenizer(Path(MODELS["specialised"])), 52)
    rows = [chat_row(f"sort {'ab' * (1 + i % 3)}{i}", "ab" * (40 if i == 7 else 9)) for i in range(150)]
    one = survey(str(write_lines(tmp_path / "chats.jsonl", rows)), "--domain", Tokenizers(reader, reader))
    assert (one.task, one.answer_length(), max(one.answer_lengths)) == ("likelihood", 19, 81)
    assert len(one.questions) == 15 and len(one.rows) == 135

    def task(*answers):
        return find_task([{"prompt": "q", "answer": answer} for answer in answers], [len(a) for a in answers])

    assert [task("B", "a"), task("1,200", "-3.5"), task("B", "yes"), task("x" * 17)] == ["choice", "gsm8k", "exact", ""]
    assert find_task([chat_row("q") | {"response": "B"}], [1]) == "likelihood" and find_task([], []) == ""
    assert hold_out(rows[:99], list(range(99))) == (list(range(99)), []), "too few questions to measure anything"
    kept, questions = hold_out([*rows[:100], *rows[:100]], list(range(100)))
    assert len(questions) == 10 and not {i % 100 for i in kept} & set(questions), "a copy of a question is no prompt"


def test_an_adapter_is_trained_as_it_is_on_prompts_that_the_original_writes(tmp_path, few):
    """The config has no new adapter and no start between the models, and ten times the learning rate."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": MODELS["general"]}))
    names = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{m}.weight" for i in range(3) for m in "AB"]
    shapes = {"A": (4, 96), "B": (96, 4)}
    tensors = {name: np.zeros(shapes[name.split("lora_")[1][0]], np.float32) for name in names}
    save_file(tensors, folder / "adapter_model.safetensors")

    written = new_run.write(request(tmp_path / "mine", specialised=str(folder), domain=few, general_prompts=None))
    config = load(tmp_path / "mine" / "config.py")
    assert config.adapter is None and config.start.interpolation == 0
    assert config.optimizer.learning_rate == pytest.approx(2e-3)
    assert config.branches["recovery"].prompts.source == "self" and len(written.commands) == 2


def test_a_mistake_leaves_nothing(tmp_path, few):
    model = Path(shutil.copytree(MODELS["specialised"], tmp_path / "model"))
    edit_json(model / "tokenizer_config.json", chat_template=None)
    for changes, message in [
        ({"specialised": str(model)}, f"{model}: no chat template in tokenizer_config.json"),
        ({"domain": "/no/rows.jsonl"}, "--domain: no file /no/rows.jsonl"),
        ({"general": "/no/model"}, "--general: no folder /no/model"),
    ]:
        with pytest.raises(UserError, match=message):
            new_run.write(request(tmp_path / "mine", **{"domain": few} | changes))
    with pytest.raises(UserError, match="the name is that of a folder; give .*/mine$"):
        new_run.write(request(tmp_path / "mine.py"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]


@pytest.mark.slow
def test_the_config_trains_as_it_is(command, tmp_path):
    flags = [f"--{name}={folder}" for name, folder in MODELS.items()]
    missing = "--domain is missing; for example --domain=data/domain.jsonl"
    one_line(command("init", tmp_path / "mine", *flags), missing)
    flags.append(f"--domain={QUICKSTART / 'eval_domain.jsonl'}")
    written = command("init", tmp_path / "mine", *flags, f"--general_prompts={QUICKSTART / 'eval_covered.jsonl'}")
    assert written.code == 0, written.err
    config = f"--config={tmp_path / 'mine' / 'config.py'}"
    lines = written.out.splitlines()
    assert [line.split()[2] for line in lines[-2:]] == ["camopd_jax.doctor", "camopd_jax.train"]
    assert all(config in line for line in lines[-2:])
    checked = command("doctor", config)
    assert checked.code == 0 and "odd" not in checked.out, checked.out
    ended = command("train", config, f"--workdir={tmp_path / 'run'}", "--config.steps=2")
    assert ended.code == 0, ended.err
    assert load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert [row["phase"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == ["recovery", "review"]
    measured = {(row["model"], row["benchmark"]) for row in read_lines(tmp_path / "run" / "eval.jsonl")}
    assert {("student", "general"), ("student", "domain")} <= measured
