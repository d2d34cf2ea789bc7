"""`doctor`: no findings for a valid config, and all errors of an invalid one at once."""

import dataclasses
import json
import os
import re
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from peft import LoraConfig, get_peft_model
from quickstart import PAPER_CONFIG, QUICKSTART
from rows import add_tokens, chat_row, edit_json, swap_tokens, write_lines
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

from camopd_jax.config.consistency import from_config_dict
from camopd_jax.config.identity import changed
from camopd_jax.config.schema import Template, TrainConfig
from camopd_jax.data import answers, templates
from camopd_jax.errors import UserError
from camopd_jax.inference import loading
from camopd_jax.method.setup import resolve
from camopd_jax.models import hf
from camopd_jax.models.config import from_hf
from camopd_jax.models.transformer import Model
from camopd_jax.planning import doctor, topology
from camopd_jax.planning.arrays import ModelShapes
from camopd_jax.planning.costs import memory_estimate
from camopd_jax.planning.memory import check_memory, device_memory
from camopd_jax.runs.workdir import claim_workdir

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config():
    return from_config_dict(TrainConfig, runpy.run_path(str(ROOT / "configs/quickstart.py"))["get_config"]("camopd"))


@pytest.fixture
def here():
    return topology.describe("local")


@pytest.fixture
def model(tmp_path):
    """A copy of the specialised model that a test may damage."""
    return Path(shutil.copytree(QUICKSTART / "specialist", tmp_path / "model"))


def texts(findings, kind, about=""):
    return [one.text for one in findings if one.kind == kind and one.about.startswith(about)]


def test_a_start_between_models_of_different_architectures(config, here, model, tmp_path, monkeypatch):
    """The check of a run itself (`load_models`). An adapter has one set of frozen weights, and small checkpoints."""
    edit_json(model / "config.json", rope_theta=5000.0)
    between = changed(config, {"general_model": str(model), "start.interpolation": 0.1})
    findings, _ = doctor.examine(between, None, here)
    line = f"config.specialised_model: its architecture is not that of {model}; only a model made from the original"
    assert texts(findings, "wrong")[0].startswith(line)
    adapter = changed(config, {"adapter": {"rank": 2}, "start.interpolation": 0.1})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 2**20))
    findings, _ = doctor.examine(adapter, str(tmp_path / "run"), here)
    (wrong,) = texts(findings, "wrong")
    assert "config.start.interpolation is 0.1, but the student is trained by an adapter" in wrong
    assert "; one set of frozen weights serves specialised and student" in texts(findings, "good", "devices")[1]
    same = changed(config, {"start.interpolation": "auto"})
    assert texts(doctor.examine(same, None, here)[0], "good", "start") == ["auto of the original model"]


def test_a_valid_config_has_no_errors_or_warnings(config, here, tmp_path):
    findings, prompts = doctor.examine(config, str(tmp_path / "run"), here)
    assert texts(findings, "wrong") == texts(findings, "odd") == []
    assert "1600 prompts of 11 to 16 tokens" in texts(findings, "good", "recovery prompts")[0]
    assert (
        "180 steps of 64 use each 7.2 times" in texts(findings, "good", "recovery prompts")[0]
    )  # 240 * 3/4 * 64 / 1600
    assert prompts["review"].startswith("<|user|>") and prompts["review"].endswith("<|assistant|>")
    assert not (tmp_path / "run").exists()


def test_all_errors_are_reported_at_once(command, tmp_path):
    ended = command(
        "doctor", PAPER_CONFIG, "--config.specialised_model=/no/model",
        "--config.mesh.fsdp=3", f"--workdir={tmp_path / 'run'}",
        '--config.evaluation.benchmarks=({"name": "mine", "source": "/no/questions.jsonl"},)',
    )  # fmt: skip
    assert ended.code == 2 and ended.err.splitlines()[-1] == "error: 3 of these would stop the run"
    printed = " ".join(ended.out.split())
    for words in ("no folder /no/model", "/no/questions.jsonl", "fsdp 3"):
        assert words in printed, printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_takes_long_is_shown(command, tmp_path):
    """Without a terminal, a line after 3 seconds: these prompts are read for longer."""
    rows = (ROOT / "examples/quickstart/general_prompts.jsonl").read_text()
    (tmp_path / "many.jsonl").write_text(25 * rows)
    ended = command(
        "doctor", PAPER_CONFIG,
        f"--config.branches.recovery.prompts.source={tmp_path / 'many.jsonl'}",
    )  # fmt: skip
    assert ended.code == 0 and re.search(r"^checking, \d+ s", ended.out, re.M), ended.out


def test_a_checkpoint_of_another_shape(config, here, model):
    edit_json(model / "config.json", intermediate_size=64)
    findings, _ = doctor.examine(changed(config, {"specialised_model": str(model)}), None, here)
    (text,) = texts(findings, "wrong")
    assert "has shape" in text and "config.json asks for" in text


def test_tokenizers_that_differ(config, here, model):
    swap_tokens(model, "a", "b")
    findings, _ = doctor.examine(changed(config, {"specialised_model": str(model)}), None, here)
    assert "their tokenizers differ" in texts(findings, "wrong", "models")[0]


def test_two_equal_models(config, here):
    findings, _ = doctor.examine(changed(config, {"general_model": str(QUICKSTART / "specialist")}), None, here)
    assert texts(findings, "wrong") == [] and "no lost ability to recover" in texts(findings, "odd", "models")[0]


def test_an_end_of_turn_token_that_is_not_eos(config, here, model):
    for name in ("config.json", "generation_config.json"):
        if (model / name).exists():
            edit_json(model / name, eos_token_id=None)
    edit_json(model / "tokenizer_config.json", eos_token="a")
    findings, _ = doctor.examine(changed(config, {"specialised_model": str(model)}), None, here)
    assert "ends answers with '<|end|>', but generation stops only at ['a']" in texts(findings, "odd", "models")[-1]


def test_an_end_of_turn_with_a_line_break_behind_it(config, here, model):
    """As Gemma 3's and Phi-4's: the line break ends no answer, and nobody is told to make it do so."""
    template = json.loads((model / "tokenizer_config.json").read_text())["chat_template"]
    edit_json(model / "tokenizer_config.json", chat_template=template.replace("<|end|>", "<|end|>\n"))
    findings, _ = doctor.examine(changed(config, {"specialised_model": str(model)}), None, here)
    assert texts(findings, "odd") == texts(findings, "wrong") == []


def test_tokens_that_the_embedding_has_no_row_for(config, here, model, tmp_path):
    add_tokens(model, "[PAD]", "[X]")
    changes = {"specialised_model": str(model)}
    findings, _ = doctor.examine(changed(config, changes), None, here)
    assert "has 2 tokens beyond the embedding's 52 rows, the first is '[PAD]'" in texts(findings, "odd", "special")[0]
    assert texts(findings, "wrong") == []
    rows = write_lines(
        tmp_path / "rows.jsonl", [chat_row("sort a") | {"answer": "a"}, chat_row("sort [X]") | {"answer": "a"}]
    )
    benchmark = dataclasses.asdict(config.evaluation.benchmarks[0]) | {"name": "mine", "source": str(rows)}
    changes |= {"branches.recovery.prompts.source": str(rows), "evaluation.benchmarks": [benchmark]}
    findings, _ = doctor.examine(changed(config, changes), None, here)
    (of_benchmark,), (of_prompts,) = (texts(findings, "wrong", about) for about in ("benchmark", "recovery"))
    assert all(f"{rows}:2: token '[X]' (id 53) is beyond the 52 rows" in text for text in (of_benchmark, of_prompts))


def test_answers_longer_than_the_models_maximum(config, here):
    findings, _ = doctor.examine(changed(config, {"rollout.max_response_tokens": 10_000}), None, here)
    assert "but prompt and answer may have 10064 tokens" in texts(findings, "odd", "general model")[0]


def test_prompts_that_are_few_long_or_evaluation_questions(config, here, tmp_path):
    questions = [chat_row(f"sort {text}") | {"answer": text} for text in ("cab", "dcb", "zya")]
    benchmark = write_lines(tmp_path / "benchmark.jsonl", questions)
    prompts = write_lines(
        tmp_path / "prompts.jsonl", [*questions[:2], *(chat_row("sort " + 70 * "ab") for _ in range(3))]
    )
    changes = {
        "branches.recovery.prompts.source": str(prompts),
        "evaluation.benchmarks": [
            dataclasses.asdict(config.evaluation.benchmarks[0]) | {"name": "mine", "source": str(benchmark)}
        ],
    }
    findings, _ = doctor.examine(changed(config, changes), None, here)
    odd = texts(findings, "odd", "recovery prompts")
    assert [text.split(" are ")[0] for text in odd] == ["3 of 5", "2", "2 of the 3 questions of benchmark mine"]
    assert "on the domain axis" in texts(findings, "odd", "benchmarks")[0]


def test_a_mesh_and_memory_that_do_not_fit(config, here):
    findings, _ = doctor.examine(changed(config, {"mesh.tensor": 8, "mesh.data": 1}), None, here)
    assert "does not divide the model's" in texts(findings, "wrong", "devices")[0]
    small = dataclasses.replace(here, hbm=2**20)
    findings, _ = doctor.examine(config, None, small)
    assert "config.compute.offload=late" in texts(findings, "wrong", "devices")[0]


def test_what_is_chosen_for_the_device(config, here, tmp_path):
    """A new run, and one that has begun with other values, which it keeps."""
    auto = changed(config, {"compute.remat": "auto", "optimizer.micro_batch": "auto"})
    findings, _ = doctor.examine(auto, None, dataclasses.replace(here, hbm=2**30))
    assert texts(findings, "good", "devices")[-1].startswith("auto: remat rollout, micro-batch 64: ")  # 8 devices
    assert texts(findings, "good", "devices")[-1].endswith(" of 1 GiB by the plan")
    claim_workdir(epath.Path(tmp_path), changed(config, {"compute.remat": "block", "optimizer.micro_batch": 16}))
    findings, _ = doctor.examine(auto, str(tmp_path), here)
    assert texts(findings, "good", "devices")[-1].startswith("auto: remat block, micro-batch 16: ")


def test_what_certainly_does_not_fit_is_refused_and_what_may_fit_is_not(config):
    """Weights, gradient and moments are counted exactly; a stage with activations may take half of its estimate."""
    setup = resolve(changed(config, {"rollout.max_response_tokens": 4096}))
    models = ModelShapes({name: loading.model_config(QUICKSTART / "specialist") for name in ("general", "specialised")})
    estimate = memory_estimate(setup, models)
    stage, most = max(estimate.items(), key=lambda item: item[1])
    check_memory(setup, models, most / 2)
    with pytest.raises(UserError, match=f"{stage} takes about .* or use more devices"):
        check_memory(setup, models, most / 2 - 1)
    with pytest.raises(UserError, match="parameters, gradient, Adam's moments and teachers take"):
        check_memory(setup, models, estimate["update"] - 1)
    assert (
        2**30 < device_memory() * jax.local_device_count() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )


def test_the_minimum_memory_is_the_sum_of_its_parts(config, here):
    """The memory of an update, and of a gradient without its activations."""
    model = from_hf(hf.read_config(QUICKSTART / "specialist"))
    n = sum(p.size for p in jax.tree.leaves(jax.eval_shape(Model(model).init, jax.random.key(0))))

    def least(**changes):
        setup = resolve(changed(config, {"mesh.data": 1} | changes), jax.devices()[:1])
        return memory_estimate(setup, ModelShapes({"general": model, "specialised": model}))["update"]

    bfloat16 = {"compute.matmul": "bfloat16"}
    assert least() == n * (4 + 4 + 8 + 4 + 4)
    assert least(**bfloat16) == n * (4 + 4 + 8 + 2 + 2)
    idle = least(**bfloat16, **{"compute.offload": "late"})
    assert idle == n * (4 + 4 + 8), "an update, of which the teachers know nothing"


def test_three_branches_have_three_teachers(config, here, model):
    """The third branch's teacher is checked like the other models, and its prompts with this teacher's tokenizer."""
    third = dataclasses.asdict(config.branches["review"]) | {"teacher": str(model), "objective": "reverse_kl"}
    findings, prompts = doctor.examine(changed(config, {"branches.law": third}), None, here)
    assert texts(findings, "wrong") == []
    assert "M parameters" in texts(findings, "good", "teacher of law")[0]
    assert list(prompts) == ["recovery", "review", "law"] and prompts["law"] == prompts["review"]
    swap_tokens(model, "a", "b")
    findings, _ = doctor.examine(changed(config, {"branches.law": third}), None, here)
    assert "their tokenizers differ" in texts(findings, "wrong", "models")[0]
    third["teacher"] = "/no/law"
    findings, _ = doctor.examine(changed(config, {"branches.law": third}), None, here)
    assert texts(findings, "wrong")[0].startswith("config.branches.law.teacher: no folder /no/law")


def test_settings_that_the_platform_does_not_support(config, here):
    """All checks that a run does when it starts."""
    for changes, message in [
        ({"compute.remat": "rollout", "compute.matmul": "bfloat16"}, "needs the sampler"),
        ({"branches.recovery.objective": "kl"}, "the objectives are"),
        ({"compute.attention": "fused"}, "only TPUs and NVIDIA GPUs"),
        ({"rollout.concurrency": 4}, "config.rollout.concurrency is 4"),
    ]:
        findings, _ = doctor.examine(changed(config, changes), None, here)
        assert message in texts(findings, "wrong", "devices")[0]


def test_a_work_directory_of_another_run(config, here, tmp_path):
    claim_workdir(epath.Path(tmp_path), changed(config, {"seed": 7}))
    findings, _ = doctor.examine(config, str(tmp_path), here)
    assert "(config.seed)" in texts(findings, "wrong", "workdir")[0]
    findings, _ = doctor.examine(changed(config, {"seed": 7}), str(tmp_path), here)
    assert "which will continue" in texts(findings, "good", "workdir")[0]


def test_a_disk_too_small_for_the_checkpoints(config, here, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 2**20))
    findings, _ = doctor.examine(config, str(tmp_path / "run"), here)
    assert "config.checkpoints.keep_last" in texts(findings, "wrong", "workdir")[0]


def test_an_index_beside_a_file_that_is_read_instead(config, here, model):
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "old.safetensors"}}')
    findings, _ = doctor.examine(changed(config, {"specialised_model": str(model)}), None, here)
    assert "model.safetensors.index.json and its files (old.safetensors" in texts(findings, "odd", "specialised")[0]


def of_models(config, model):
    """Unusual settings of the models, without a look at the prompts."""
    look = doctor.Examination(changed(config, {"specialised_model": str(model)}))
    look.model("general model", "general", "config.general_model")
    look.model("specialised model", "specialised", "config.specialised_model")
    look.tokenizers("models")
    return texts(look.findings, "odd")


def test_the_same_weights_in_another_dtype_are_seen(config, model):
    general = QUICKSTART / "generalist"
    weights = {name: t.astype(np.float64) for name, t in load_file(general / "model.safetensors").items()}
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, model / "model.safetensors")
    edit_json(model / "config.json", torch_dtype="float64")
    assert ["hold the same weights" in text for text in of_models(config, model)] == [True]
    weights["model.norm.weight"][-1] += 1e-3
    save_file(weights, model / "model.safetensors")
    assert of_models(config, model) == []


def test_a_general_model_that_is_an_adapter_of_the_specialised_one(model, tmp_path):
    assert loading.pair_warning(QUICKSTART / "generalist", model) is None
    base = LlamaForCausalLM.from_pretrained(model)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert "adapter of config.specialised_model" in loading.pair_warning(tmp_path / "adapter", model)
    assert loading.pair_warning(model, tmp_path / "adapter") is None


def test_a_template_that_ignores_the_generation_prompt(config, model):
    edit_json(
        model / "tokenizer_config.json",
        chat_template="{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}",
    )
    assert ["'<|assistant|>' before an answer" in text for text in of_models(config, model)] == [True]
    tokenizer = templates.load_tokenizer(model)  # nothing before an answer, as in the templates of Mistral
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['content'] + ']' if m['role'] == 'user' else m['content'] }}{% endfor %}"
    )
    assert answers.prompt_warning(tokenizer, Template()) is None
