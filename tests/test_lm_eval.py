"""Our engine under lm_eval: likelihoods and answers against transformers on torch, and its command on a local task."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from rows import ask, read_lines, write_lines

from camopd_jax.evals.harness import CamopdLM

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "quickstart" / "generalist"
PAIRS = [("reverse: abc", " cba"), ("sort: cab", " abc and more"), ("add: 12 and 3 ", "15"), ("", "double: abc")]


@pytest.fixture(scope="module")
def ours():
    return CamopdLM(str(FOLDER), batch_size=8, max_length=48)


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def requests(kind, *args):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(args)]


def torch_logprobs(model, ids):
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)


def test_likelihoods_are_those_of_transformers(ours, theirs):
    found = ours.loglikelihood(requests("loglikelihood", *PAIRS))
    for (context, continuation), (value, _) in zip(PAIRS, found, strict=True):
        before = ours.tok_encode(context.rstrip()) or [ours.prefix_token_id]
        ids = ours.tok_encode(context + continuation)
        ids = ids if context else [*before, *ids]
        logp = torch_logprobs(theirs, ids)
        said = range(len(before), len(ids))
        assert value == pytest.approx(sum(float(logp[i - 1, ids[i]]) for i in said), abs=1e-3)


def test_what_greedy_decoding_says_is_told(ours):
    prompt = ours.apply_chat_template(ask("reverse: abcd")["messages"])
    (said,) = ours.generate_until(requests("generate_until", (prompt, {"until": [], "max_gen_toks": 16})))
    assert said == "dcba"
    greedy, other = ours.loglikelihood(requests("loglikelihood", (prompt, said), (prompt, "dcab")))
    assert greedy[1] and not other[1] and greedy[0] > other[0]


@pytest.mark.parametrize("length", [10, 47, 130])
def test_a_rolling_likelihood_predicts_each_token_once(ours, theirs, length):
    """In lm_eval's windows: one after the other, each begins on the token before; the last is whole."""
    text = ("sort: the quick fox and a lazy dog, " * 5)[:length]
    ids = ours.tok_encode(text)
    (value,) = ours.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    window, by_hand = ours.max_length - 1, 0.0
    for i in range(len(ids)):
        end = min((i // window + 1) * window, len(ids))
        context = [ours.prefix_token_id, *ids[:i]] if i < window else ids[end - window - 1 : i]
        by_hand += float(torch_logprobs(theirs, context)[-1, ids[i]])
    assert value == pytest.approx(by_hand, abs=2e-3)


def test_answers_end_at_the_first_stop_string_and_keep_their_order(ours):
    prompts = [
        ours.apply_chat_template(ask(text)["messages"]) for text in ("reverse: abcd", "sort: dcba", "reverse: bcda")
    ]
    settings = ({"until": ["cb", "a"]}, {"until": "d", "max_gen_toks": 3}, {"max_new_tokens": 2})
    said = ours.generate_until(requests("generate_until", *zip(prompts, settings, strict=True)))
    assert said == ["d", "abc", "ad"]


def test_sampled_answers_come_again_with_the_seed(ours):
    prompt = ours.apply_chat_template(ask("hello")["messages"])
    asked = requests(
        "generate_until", (prompt, {"until": [], "do_sample": True, "temperature": 2.0, "max_gen_toks": 16})
    )
    assert ours.generate_until(asked) == ours.generate_until(asked)


def test_a_long_context_loses_its_front(ours):
    tail = "reverse: abc"
    long, short = "x" * 100 + tail, tail
    both = ours.loglikelihood(requests("loglikelihood", (long, "cba"), (("x" * 100 + short)[-45:], "cba")))
    assert both[0][0] == pytest.approx(both[1][0], abs=1e-4)


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


def test_its_command_runs_a_task_that_needs_no_download(command, tmp_path):
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


def test_a_folder_that_is_not_there_gets_one_line(command):
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
