"""The model in lm_eval: likelihoods and answers against transformers on torch, and the command with a local task."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from quickstart import QUICKSTART
from rows import add_tokens, chat_row, read_lines, write_lines

from camopd_jax.errors import UserError
from camopd_jax.evals.harness import CamopdLM

ROOT = Path(__file__).parents[1]
FOLDER = QUICKSTART / "generalist"
PAIRS = [("reverse: abc", " cba"), ("sort: cab", " abc and more"), ("add: 12 and 3 ", "15"), ("", "double: abc")]


@pytest.fixture(scope="module")
def ours():
    return CamopdLM(str(FOLDER), batch_size=8, max_length=48)


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def hflm():
    """lm_eval's own model, of transformers on torch."""
    return HFLM(pretrained=str(FOLDER), device="cpu", dtype="float32", batch_size=8, max_length=48)


def requests(kind, *args):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(args)]


def torch_logprobs(model, ids):
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)


def test_likelihoods_equal_transformers(ours, theirs):
    found = ours.loglikelihood(requests("loglikelihood", *PAIRS))
    for (context, continuation), (value, _) in zip(PAIRS, found, strict=True):
        before = ours.tok_encode(context.rstrip()) or [ours.prefix_token_id]
        ids = ours.tok_encode(context + continuation)
        ids = ids if context else [*before, *ids]
        logp = torch_logprobs(theirs, ids)
        positions = range(len(before), len(ids))
        assert value == pytest.approx(sum(float(logp[i - 1, ids[i]]) for i in positions), abs=1e-3)


def test_texts_end_with_no_eos_and_hold_no_token_beyond_the_embedding(ours, tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    add_tokens(folder, "[X]")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|end|>", "type_id": 0}}]
    special = {"<|end|>": {"id": "<|end|>", "ids": [5], "tokens": ["<|end|>"]}}
    processor = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": processor}))
    mine = copy.copy(ours)
    mine.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    mine.loaded = dataclasses.replace(ours.loaded, tokenizer=mine.tokenizer)
    assert mine.tokenizer("abc")["input_ids"] == [*ours.tok_encode("abc"), 5]
    assert mine.tok_encode("abc") == ours.tok_encode("abc")
    with pytest.raises(UserError, match=r"text 'a\[X\]': token '\[X\]' \(id 52\) is beyond the 52 rows"):
        mine.tok_encode("a[X]")


def test_greedy_continuations_are_recognised(ours):
    prompt = ours.apply_chat_template(chat_row("reverse: abcd")["messages"])
    (answer,) = ours.generate_until(requests("generate_until", (prompt, {"until": [], "max_gen_toks": 16})))
    assert answer == "dcba"
    greedy, other = ours.loglikelihood(requests("loglikelihood", (prompt, answer), (prompt, "dcab")))
    assert greedy[1] and not other[1] and greedy[0] > other[0]


TEXT = "sort: the quick fox and a lazy dog, " * 5


def test_rolling_likelihoods_are_those_of_lm_evals_own_model(ours, hflm):
    """Of texts that end before, at and after the windows, which are max_length tokens wide."""
    asked = requests("loglikelihood_rolling", *((TEXT[:n],) for n in (0, 1, 10, 47, 48, 49, 96, 97, 130)))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(hflm.loglikelihood_rolling(asked), abs=2e-3)


def test_a_long_context_loses_the_same_front_as_in_lm_evals_own_model(ours, hflm):
    """The last token of a continuation is no input: 46 tokens of context fit beside 3 within a max_length of 48."""
    asked = requests("loglikelihood", *((TEXT[:n], "cba") for n in (44, 45, 46, 47, 48, 100)))
    found, expected = (zip(*model.loglikelihood(asked), strict=True) for model in (ours, hflm))
    for values, of_hflm in zip(found, expected, strict=True):  # likelihoods, then whether they are greedy
        assert values == pytest.approx(of_hflm, abs=1e-3)


def test_answers_end_at_the_first_stop_string_and_keep_their_order(ours):
    prompts = [
        ours.apply_chat_template(chat_row(text)["messages"])
        for text in ("reverse: abcd", "sort: dcba", "reverse: bcda")
    ]
    settings = ({"until": ["cb", "a"]}, {"until": "d", "max_gen_toks": 3}, {"max_new_tokens": 2})
    answers = ours.generate_until(requests("generate_until", *zip(prompts, settings, strict=True)))
    assert answers == ["d", "abc", "ad"]


def test_sampled_answers_repeat_with_the_seed(ours):
    prompt = ours.apply_chat_template(chat_row("hello")["messages"])
    repeated = requests(
        "generate_until", (prompt, {"until": [], "do_sample": True, "temperature": 2.0, "max_gen_toks": 16})
    )
    assert ours.generate_until(repeated) == ours.generate_until(repeated)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
metric_list:
  - metric: {metric}
"""


@pytest.mark.slow
def test_the_command_runs_a_local_task(command, tmp_path):
    rows = [
        {"question": f"reverse: {text}", "answer": text[::-1], "choices": [text[::-1], text]}
        for text in ("abcd", "bca", "cdab")
    ]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    generate = TASK.format(
        name="reversing",
        file=file,
        kind="generate_until",
        metric="exact_match",
        more='generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}',
    )
    choose = TASK.format(
        name="choosing",
        file=file,
        kind="multiple_choice",
        metric="acc",
        more='doc_to_choice: "{{choices}}"\ntarget_delimiter: ""',
    ).replace('doc_to_target: "{{answer}}"', "doc_to_target: 0")
    (tmp_path / "reversing.yaml").write_text(generate)
    (tmp_path / "choosing.yaml").write_text(choose)
    ended = command(
        "lm_eval",
        "--model",
        "camopd_jax",
        "--model_args",
        f"path={FOLDER}",
        "--batch_size",
        "4",
        "--apply_chat_template",
        "--tasks",
        "reversing,choosing",
        "--include_path",
        tmp_path,
        "--output_path",
        tmp_path / "out",
        "--log_samples",
        env={"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"},
    )
    assert ended.code == 0, ended.err
    (results,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    assert scores["reversing"]["exact_match,none"] == 1.0 and scores["choosing"]["acc,none"] == 1.0
    (samples,) = (tmp_path / "out").rglob("samples_reversing_*.jsonl")
    assert [row["filtered_resps"][0] for row in read_lines(samples)] == ["dcba", "acb", "badc"]


@pytest.mark.slow
def test_a_batch_that_the_devices_do_not_divide_is_one_line():
    with pytest.raises(UserError, match=r"^--batch_size is 12, which is not a multiple of data x fsdp = 8 of --model"):
        CamopdLM(str(FOLDER), batch_size=12)


def test_a_missing_folder_is_one_line(command):
    ended = command("lm_eval", "--model", "camopd_jax", "--model_args", "path=/no/such", "--tasks", "arc_easy")
    assert ended.code == 2 and "--model_args path: no folder /no/such" in ended.err.splitlines()[-1]


def test_without_its_extra_it_names_the_command_that_installs_it(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError(\"No module named 'lm_eval'\", name='lm_eval')")
    ended = subprocess.run(
        [sys.executable, "-m", "camopd_jax.lm_eval", "--model", "camopd_jax"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    says = "error: the package lm_eval is not installed; pip install 'camopd_jax[eval]'\n"
    assert (ended.returncode, ended.stderr) == (2, says)
