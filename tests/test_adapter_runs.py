"""Runs with LoRA adapters: `sft` makes one, `train` trains it, `export` writes it for PEFT; one set of base weights."""

import dataclasses
import json
import shutil
import signal

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from etils import epath
from lm_eval.api.instance import Instance
from quickstart import PAPER_CONFIG, QUICKSTART
from rows import edit_json, read_lines, write_lines
from safetensors.numpy import load_file
from scoring import log_probs, torch_log_probs

from camopd_jax.config.schema import Adapter, BranchConfig, Compute, Stream, TrainConfig
from camopd_jax.errors import UserError
from camopd_jax.evals.harness import CamopdLM
from camopd_jax.inference import loading
from camopd_jax.method.branches import load_models, make_teachers, offload_teachers
from camopd_jax.method.setup import resolve
from camopd_jax.models import partition
from camopd_jax.models.peft_settings import CONFIG
from camopd_jax.runs.export import write_folder
from camopd_jax.runtime.mesh import make_mesh

GENERALIST, SPECIALIST = QUICKSTART / "generalist", QUICKSTART / "specialist"
SFT = f"""
from camopd_jax.config import SftConfig, default

def get_config():
    config = default(SftConfig)
    config.model = "{GENERALIST}"
    config.data.source = "{QUICKSTART / "eval_domain.jsonl"}"
    config.answer = "Final answer: {{letter}}"
    config.steps = 6
    config.batch_size = 16
    config.max_tokens = 128
    config.optimizer.learning_rate = 1e-2
    config.adapter = dict(rank=5, alpha=8, targets=("q_proj", "o_proj", "down_proj"))
    config.log.report = False
    return config
"""
SMALL = [
    PAPER_CONFIG,
    "--config.steps=4", "--config.rollout.batch_size=16",
    "--config.optimizer.micro_batch=8", "--config.checkpoints.every=2", "--config.evaluation.benchmarks=()",
    "--config.log.report=false", "--config.optimizer.schedule=constant", "--config.optimizer.learning_rate=1e-3",
]  # fmt: skip
ROWS = [{"messages": [{"role": "user", "content": "reverse abcd"}], "response": "dcba"},
        {"messages": [{"role": "user", "content": "sort zxy"}], "response": "xyz and more"}]  # fmt: skip


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, command):
    """The work directory of `sft` with an adapter."""
    folder = tmp_path_factory.mktemp("sft")
    (folder / "config.py").write_text(SFT)
    ended = command("sft", f"--workdir={folder / 'run'}", f"--config={folder / 'config.py'}")
    assert ended.code == 0, ended.err
    return folder / "run"


@pytest.fixture(scope="module")
def recovered(tmp_path_factory, command, adapted):
    """The work directory of `train`, whose specialised model is that adapter."""
    workdir = tmp_path_factory.mktemp("train") / "run"
    ended = command("train", f"--workdir={workdir}", *SMALL, f"--config.specialised_model={adapted / 'export'}")
    assert ended.code == 0, ended.err
    return workdir


def our_log_probs(folder, tokens):
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    loaded = loading.load(folder, mesh, Compute(), dtype="float32", context=32)
    return log_probs(loaded.model, loaded.params, tokens)


def weights(workdir):
    return load_file(workdir / "export" / "adapter_model.safetensors")


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def from_peft(folder, base):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder).eval()


def test_peft_and_transformers_give_the_logits_of_a_model_of_sft_and_train(adapted, recovered, command, tmp_path):
    assert read_lines(adapted / "metrics.jsonl")[-1]["loss"] < 0.6 * read_lines(adapted / "metrics.jsonl")[0]["loss"]
    changed = [(weights(adapted)[name] != tensor).mean() for name, tensor in weights(recovered).items()]
    assert len(changed) == 2 * 3 * 3 and min(changed) > 0.9
    tokens = np.random.default_rng(0).integers(6, 52, (2, 17)).astype(np.int32)
    expected = torch_log_probs(from_peft(recovered / "export", GENERALIST), tokens)
    base = transformers.AutoModelForCausalLM.from_pretrained(GENERALIST, dtype=torch.float32)
    assert np.abs(torch_log_probs(base, tokens) - expected).mean() > 0.1
    np.testing.assert_allclose(our_log_probs(recovered / "export", tokens), expected, atol=2e-5, rtol=0)

    ended = command("export", f"--workdir={recovered}", f"--out={tmp_path / 'merged'}", "--merge")
    assert ended.code == 0, ended.err
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(torch_log_probs(merged, tokens), expected, atol=2e-5, rtol=0)
    np.testing.assert_allclose(our_log_probs(tmp_path / "merged", tokens), expected, atol=2e-5, rtol=0)
    card = (recovered / "export" / "README.md").read_text()
    assert f'base_model: "{GENERALIST}"' in card and "library_name: peft" in card
    assert "library_name: transformers" in (tmp_path / "merged" / "README.md").read_text()
    transformers.AutoTokenizer.from_pretrained(recovered / "export")


@pytest.mark.slow
def test_a_run_continues_with_the_same_bits_and_saves_the_adapter_alone(recovered, adapted, command, tmp_path):
    flags = [f"--workdir={tmp_path / 'run'}", *SMALL, f"--config.specialised_model={adapted / 'export'}"]
    assert command("train", *flags, "--config.steps=2").code == 0
    ended = command("train", *flags)
    assert ended.code == 0 and "continuing from step 2" in ended.out
    same(weights(tmp_path / "run"), weights(recovered))
    names = json.loads((tmp_path / "run" / "checkpoints" / "4" / "digests" / "metadata").read_text()).keys()
    assert {name for name in names if "kernel" in name or "embedding" in name or "lora_scale" in name} == set()
    assert sum("lora_a" in name for name in names) == 3 * 3  # three matrices, each with two moments


@pytest.mark.slow
def test_a_run_on_a_base_in_int8(adapted, command, tmp_path):
    """It continues with the same bits, decoding agrees with scoring, and what is exported knows nothing of int8."""
    models = f"--config.specialised_model={adapted / 'export'}"
    flags = [*SMALL, models, "--config.compute.teacher=int8", "--config.rollout.student_logprobs=forward"]
    for name, steps in (("once", 4), ("twice", 2), ("twice", 4)):
        ended = command("train", f"--workdir={tmp_path / name}", *flags, f"--config.steps={steps}")
        assert ended.code == 0, ended.err
    assert "continuing from step 2" in ended.out
    same(weights(tmp_path / "twice"), weights(tmp_path / "once"))
    for row in read_lines(tmp_path / "once" / "metrics.jsonl"):
        assert row["sampler_gap"] < 1e-5
    before, after = weights(adapted), weights(tmp_path / "once")
    assert min((before[name] != after[name]).mean() for name in before) > 0.9

    ended = command("export", f"--workdir={tmp_path / 'once'}", f"--out={tmp_path / 'merged'}", "--merge")
    assert ended.code == 0, ended.err
    base, merged = (load_file(folder / "model.safetensors") for folder in (GENERALIST, tmp_path / "merged"))
    prefix = "base_model.model."
    for name, tensor in base.items():
        module = prefix + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" not in after:
            np.testing.assert_array_equal(merged[name], tensor, err_msg=name)
            continue
        product = after[f"{module}.lora_B.weight"] @ after[f"{module}.lora_A.weight"]
        np.testing.assert_allclose(merged[name], tensor + 8 / 5 * product, atol=1e-6, rtol=0, err_msg=name)


def test_lm_eval_reads_the_folder_of_an_adapter(adapted):
    model = CamopdLM(str(adapted / "export"), batch_size=8, max_length=48)
    texts = [("reverse: abc", " cba"), ("sort: cab", " abc and more")]
    requests = [Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)]
    torch_model = from_peft(adapted / "export", GENERALIST)
    for (context, continuation), (value, _) in zip(texts, model.loglikelihood(requests), strict=True):
        before, ids = model.tok_encode(context), model.tok_encode(context + continuation)
        expected = torch_log_probs(torch_model, np.array([ids]))[0, len(before) - 1 :].sum()
        assert value == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.slow
def test_generate_and_evaluate_read_the_folder_of_an_adapter(adapted, command, tmp_path):
    """Greedy answers are those of PEFT. A base in int8 is evaluated as it is, beside the adapter."""
    folder, source = adapted / "export", write_lines(tmp_path / "rows.jsonl", [{"prompt": "reverse: abcd"}])
    flags = [f"--input={source}", f"--output={tmp_path / 'answers.jsonl'}", "--max_new_tokens=12", "--batch_size=1"]
    ended = command("generate", f"--model={folder}", *flags)
    assert ended.code == 0, ended.err
    (row,) = read_lines(tmp_path / "answers.jsonl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("reverse: abcd")["input_ids"]])
    answer = from_peft(folder, GENERALIST).generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    assert row["response_ids"] == answer[0, ids.shape[1] :].tolist()

    results = {}
    for teacher in ("float32", "int8"):
        flags = [f"--workdir={tmp_path / teacher}", f"--checkpoint={folder}", f"--config.compute.teacher={teacher}"]
        ended = command("evaluate", PAPER_CONFIG, *flags)
        assert ended.code == 0, ended.err
        results[teacher] = read_lines(tmp_path / teacher / "eval.jsonl")
    assert [row.keys() for row in results["int8"]] == [row.keys() for row in results["float32"]]


@pytest.mark.slow
def test_a_killed_run_continues_with_the_same_bits(recovered, adapted, command, tmp_path):
    workdir = tmp_path / "run"
    flags = [f"--workdir={workdir}", *SMALL, f"--config.specialised_model={adapted / 'export'}"]
    command.start("train", *flags).when((workdir / "checkpoints" / "2" / "digests").exists, signal.SIGKILL)
    ended = command("train", *flags)
    assert ended.code == 0 and "continuing from step" in ended.out
    same(weights(workdir), weights(recovered))


@pytest.mark.slow
@pytest.mark.parametrize("listed", [None, ["embed_tokens", "lm_head"]])  # one tensor in the base; the second parts them
def test_a_run_with_an_adapter_of_a_larger_vocabulary(listed, command, tmp_path):
    """A new token is read and never sampled; PEFT and transformers give the logits of what is exported and merged.

    The log-probabilities of random tokens are down to -18, of sums in float32.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(GENERALIST)
    tokenizer.add_tokens(["<new>"])
    rows = len(tokenizer) + 4  # some without a token
    model = transformers.AutoModelForCausalLM.from_pretrained(GENERALIST, dtype=torch.float32)
    model.resize_token_embeddings(rows)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "up_proj"], modules_to_save=listed)
    model = peft.get_peft_model(model, settings)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    models = f"--config.specialised_model={tmp_path / 'adapter'}"
    ended = command("train", f"--workdir={tmp_path / 'run'}", *SMALL, models)
    assert ended.code == 0, ended.err
    assert f"share their first {rows - 5} tokens; the student's answers" in " ".join(ended.out.split())
    before, after = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), weights(tmp_path / "run")
    for name, tensor in after.items():
        assert ("lora_" in name) == (tensor != before[name]).any()

    tokens = np.random.default_rng(0).integers(6, rows, (2, 17)).astype(np.int32)
    base = transformers.AutoModelForCausalLM.from_pretrained(GENERALIST, dtype=torch.float32)
    base.resize_token_embeddings(rows)
    expected = torch_log_probs(peft.PeftModel.from_pretrained(base, tmp_path / "run" / "export").eval(), tokens)
    np.testing.assert_allclose(our_log_probs(tmp_path / "run" / "export", tokens), expected, atol=5e-5, rtol=0)
    ended = command("export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'merged'}", "--merge")
    assert ended.code == 0, ended.err
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.vocab_size == rows and merged.config.tie_word_embeddings == (listed is None)
    np.testing.assert_allclose(torch_log_probs(merged, tokens), expected, atol=5e-5, rtol=0)
    np.testing.assert_allclose(our_log_probs(tmp_path / "merged", tokens), expected, atol=5e-5, rtol=0)


@pytest.mark.slow
def test_commands_read_the_folder_of_an_adapter(recovered, adapted, command, tmp_path):
    source = write_lines(tmp_path / "rows.jsonl", ROWS)
    assert command("export", f"--workdir={recovered}", f"--out={tmp_path / 'merged'}", "--merge").code == 0
    scores = []
    for name, model in (("apart", recovered / "export"), ("merged", tmp_path / "merged")):
        flags = [f"--model={model}", f"--input={source}", f"--output={tmp_path / f'{name}.jsonl'}", "--batch_size=2"]
        ended = command("score", *flags)
        assert ended.code == 0, ended.err
        scores.append([row["logprobs"] for row in read_lines(tmp_path / f"{name}.jsonl")])
    for ours, theirs in zip(*scores, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    models = f"--config.specialised_model={recovered / 'export'}"
    ended = command("interpolate", *SMALL, models, "--weight=0.5", f"--out={tmp_path / 'mean'}")
    assert ended.code == 0, ended.err
    mean, general, merged = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "mean", GENERALIST, tmp_path / "merged")
    )
    for name, tensor in mean.items():
        np.testing.assert_allclose(tensor, 0.5 * general[name] + 0.5 * merged[name], atol=1e-6)


@pytest.mark.slow
def test_a_new_adapter_on_a_full_model_also_offloaded(command, tmp_path):
    """The specialist's weights, which the student shares with it, stay where they are while the teachers are moved."""
    flags = [*SMALL, "--config.steps=4", "--config.adapter.rank=3", '--config.adapter.targets=("v_proj", "up_proj")']
    for name, offload in (("run", "off"), ("offloaded", "late")):
        ended = command("train", f"--workdir={tmp_path / name}", *flags, f"--config.compute.offload={offload}")
        assert ended.code == 0, ended.err
    same(weights(tmp_path / "offloaded"), weights(tmp_path / "run"))
    review = read_lines(tmp_path / "run" / "metrics.jsonl")[3]
    assert review["phase"] == "review" and review["gap_abs_mean"] > 0
    tokens = np.random.default_rng(0).integers(6, 52, (2, 17)).astype(np.int32)
    expected = torch_log_probs(from_peft(tmp_path / "run" / "export", SPECIALIST), tokens)
    np.testing.assert_allclose(our_log_probs(tmp_path / "run" / "export", tokens), expected, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_two_processes_on_a_mesh_equal_one(command, pair, tmp_path):
    """A new adapter, whose matrices are split over fsdp and tensor: each process has half of a matrix."""
    flags = [*SMALL, "--config.adapter.rank=3", "--config.optimizer.eps=1e-5", "--config.compute.remat=none"]
    split = ["--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2"]
    for process in pair("train", f"--workdir={tmp_path / 'two'}", *flags, *split).wait():
        assert process.code == 0, process.err
    ended = command("train", f"--workdir={tmp_path / 'one'}", *flags)
    assert ended.code == 0, ended.err
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():  # a step moves a weight by 1e-3
        np.testing.assert_allclose(tensor, theirs[name], rtol=0, atol=5e-5, err_msg=name)


def config(**fields):
    branches = {
        "recovery": BranchConfig(prompts=Stream("g"), teacher="general"),
        "review": BranchConfig(prompts=Stream("d"), teacher="specialised"),
    }
    return TrainConfig(**{"general_model": str(GENERALIST), "branches": branches, **fields})


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def size(tree):
    return sum(array.nbytes for array in jax.tree.leaves(tree))


def test_one_set_of_base_weights_serves_all_roles(adapted):
    """What the devices hold after loading: one base model, and the adapter of the teacher and of the student."""
    setup = resolve(config(specialised_model=str(adapted / "export")), devices=jax.devices()[:1])
    before = live_bytes()
    models = load_models(setup)
    base, both = size(models.general.params), size(partition.trained(models.student.params, "all"))
    scales = 3 * 3 * 4  # float32 for three modules of three layers
    assert both > 10_000 and live_bytes() - before == base + 2 * both + scales
    teachers = make_teachers(setup.config, models)
    offload_teachers(set(teachers.values()), models.student.params)
    assert not any(array.is_deleted() for array in jax.tree.leaves(models.student.params))
    assert live_bytes() - before == base + 2 * both + scales  # the teacher's matrices, which are now in host memory


def test_a_new_adapter_shares_the_weights_of_the_specialised_model():
    setup = resolve(config(specialised_model=str(SPECIALIST), adapter=Adapter(rank=3)), devices=jax.devices()[:1])
    before = live_bytes()
    models = load_models(setup)
    matrices = size(partition.trained(models.student.params, "all"))
    assert live_bytes() - before == 2 * size(models.general.params) + matrices + 7 * 3 * 4
    assert (
        models.specialised.adapter is None
        and models.student.params["embedding"] is models.specialised.params["embedding"]
    )


def test_what_is_trained_is_never_two_adapters(adapted, tmp_path, command):
    both = config(specialised_model=str(adapted / "export"), adapter=Adapter())
    with pytest.raises(UserError, match=r"^config.adapter: config.specialised_model is an adapter itself"):
        load_models(resolve(both, devices=jax.devices()[:1]))
    wrong = dataclasses.replace(both, specialised_model=str(SPECIALIST), adapter=Adapter(targets=("query",)))
    with pytest.raises(UserError, match=r"config.adapter.targets names 'query'; give some of down_proj, gate_proj, "):
        load_models(resolve(wrong, devices=jax.devices()[:1]))
    ended = command("doctor", *SMALL, f"--config.specialised_model={adapted / 'export'}", "--config.adapter.rank=4")
    assert ended.code == 2 and "is an adapter itself" in " ".join(ended.out.split())


def test_the_model_card_names_base_and_revision(tmp_path):
    """Of a base model that is in the hub's cache."""
    base = shutil.copytree(GENERALIST, tmp_path / "models--lab--base" / "snapshots" / "0a1b2c")
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    loaded = loading.load(base, mesh, Compute(), dtype="float32", context=32)
    loaded = loading.with_new_adapter(loaded, Adapter(rank=2), "lab/base", 0, "float32")
    write_folder(epath.Path(tmp_path / "out"), loaded, {"method": "CaMOPD", "specialised_model": "lab/base"})
    card, fields = (tmp_path / "out" / "README.md").read_text(), json.loads((tmp_path / "out" / CONFIG).read_text())
    assert 'base_model: "lab/base"' in card and "| base revision | `0a1b2c` |" in card
    assert f"| base fingerprint | `{loading.fingerprint(base)}` |" in card
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("lab/base", "0a1b2c")


def test_damage_to_an_exported_adapter(adapted, tmp_path):
    folder = shutil.copytree(adapted / "export", tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    with pytest.raises(UserError, match="adapter_model.safetensors: not the file whose checksum SHA256SUMS has"):
        loading.load(folder, mesh, Compute(), dtype="float32", context=32)


def test_another_base_has_another_fingerprint(adapted, tmp_path):
    """Which model an adapter is applied to is a part of what it is, but not the path of that model."""
    folder = adapted / "export"
    first = loading.fingerprint(folder)
    fields = json.loads((folder / "adapter_config.json").read_text())
    try:
        edit_json(folder / "adapter_config.json", base_model_name_or_path=str(SPECIALIST))
        assert loading.fingerprint(folder) != first
    finally:
        (folder / "adapter_config.json").write_text(json.dumps(fields))
    assert loading.fingerprint(folder) == first
