"""Maps of prompts: the gap of each group against transformers, clusters, and the draws in a run."""

import dataclasses
import json
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
import torch
import transformers
from quickstart import PAPER_CONFIG, QUICKSTART, SMALL, one_line, same_weights
from rows import read_lines

from camopd_jax.config.schema import BranchConfig, Compute, RolloutConfig, Stream, TrainConfig
from camopd_jax.data import prompt_map as maps
from camopd_jax.data import sources, templates
from camopd_jax.data.clusters import cluster
from camopd_jax.data.pipeline import PromptStream
from camopd_jax.data.prompt_map import Group, PromptMap
from camopd_jax.data.templates import Tokenizers
from camopd_jax.errors import UserError
from camopd_jax.inference import loading
from camopd_jax.inference.answer import Answer
from camopd_jax.inference.features import prompt_features
from camopd_jax.method.branches import Models
from camopd_jax.method.setup import resolve
from camopd_jax.runs import prompt_map
from camopd_jax.runs.prompt_map import MapSettings
from camopd_jax.runtime.mesh import make_mesh

GENERAL = QUICKSTART / "general_prompts.jsonl"


def config_of(source=GENERAL):
    branches = {
        "recovery": BranchConfig(Stream(str(source), limit=48), teacher="general"),
        "review": BranchConfig(Stream(str(QUICKSTART / "domain_prompts.jsonl"), limit=16), teacher="specialised"),
    }
    rollout = RolloutConfig(batch_size=8, max_prompt_tokens=64, max_response_tokens=16, smallest_bucket=16)
    general, specialised = (str(QUICKSTART / name) for name in ("generalist", "specialist"))
    return TrainConfig(general, specialised, branches=branches, rollout=rollout)


def torch_model(name):
    return transformers.AutoModelForCausalLM.from_pretrained(QUICKSTART / name, dtype=torch.float32)


def torch_log_probs(name, given):
    """For each (prompt, answer), the log-probabilities of all tokens at the answer's positions, float64[T, V]."""
    texts = [[*prompt, *ids] for prompt, ids in given]
    padded = torch.tensor([text + [0] * (32 - len(text)) for text in texts])  # attention is causal
    with torch.no_grad():
        logits = torch_model(name)(padded).logits.double().log_softmax(-1)
    return [of_one[len(prompt) - 1 : len(prompt) + len(ids) - 1]
            for of_one, (prompt, ids) in zip(logits, given, strict=True)]  # fmt: skip


def test_gaps_and_their_errors_agree_with_transformers(monkeypatch):
    """Given answers of 1 to 9 tokens; 9 prompts of each of the four skills are answered."""
    given = {}

    def answer(loaded, prompts, *, rows, **_):
        random = np.random.default_rng(0)
        for row, prompt in zip(rows, prompts, strict=True):
            given[row] = prompt, random.integers(6, 40, random.integers(1, 10)).tolist()
        return [Answer(given[row][1], [], "", True, 0.0) for row in rows]

    monkeypatch.setattr(prompt_map, "answer", answer)
    setup = resolve(config_of(), jax.devices()[:1])
    general, specialised = (
        loading.load(QUICKSTART / name, setup.mesh, Compute(), dtype="float32", context=80)
        for name in ("generalist", "specialist")
    )
    models = Models(general, specialised, specialised, {}, ())
    readers = Tokenizers(specialised.reader, general.reader)
    stream = PromptStream(setup.config.branches["recovery"].prompts, setup.config.rollout, readers, 0, range(8), "f")
    with pytest.raises(UserError, match=r"--field=skil: a prompt of recovery has no such field"):
        prompt_map.make(setup, models, "recovery", stream, MapSettings("skil"))
    made = prompt_map.make(setup, models, "recovery", stream, MapSettings("skill", answered=36))
    general, specialised = (torch_log_probs(name, given.values()) for name in ("generalist", "specialist"))
    skills = [row["skill"] for row in sources.read(str(GENERAL), limit=48)]
    gaps = {skill: [] for skill in skills}
    for row, p, q in zip(given, specialised, general, strict=True):
        gaps[skills[row]].append((p.exp() * (p - q)).sum(-1).mean().item())
    assert [group.name for group in made.groups] == list(gaps)
    for group in made.groups:
        values = gaps[group.name]
        assert (group.answered, group.prompts) == (len(values), skills.count(group.name))
        np.testing.assert_allclose(group.gap, np.mean(values), rtol=2e-5)
        np.testing.assert_allclose(group.error, np.std(values, ddof=1) / len(values) ** 0.5, rtol=2e-4)
        assert all(example.startswith(group.name) for example in group.examples)
    sizes = np.asarray([group.prompts for group in made.groups])
    np.testing.assert_allclose(
        made.gap[0], sizes @ [np.mean(gaps[group.name]) for group in made.groups] / sizes.sum(), rtol=2e-5
    )
    assert [made.groups[number].name for number in made.group_of] == skills


def test_clusters_of_the_originals_states_are_the_skills():
    """The features equal those of transformers; among 160 prompts no cluster of six mixes skills by more than 5 %."""
    tokenizer = templates.load_tokenizer(QUICKSTART / "generalist")
    rows = sources.read(str(GENERAL), limit=160)
    prompts = [tokenizer.encode(f"<|user|>{row['messages'][0]['content']}<|end|><|assistant|>") for row in rows]
    loaded = loading.load(QUICKSTART / "generalist", make_mesh(), Compute(), dtype="float32", context=64)
    features = prompt_features(loaded, prompts, batch_size=32, smallest_bucket=16)
    model = torch_model("generalist")
    for prompt, ours in list(zip(prompts, features, strict=True))[:7]:
        with torch.no_grad():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
        np.testing.assert_allclose(ours, states.mean(0), atol=2e-5)
    found = cluster(features, 6, seed=0)
    assert found.tolist() == cluster(features, 6, seed=0).tolist() and set(found) == set(range(6))
    sizes = np.bincount(found)
    assert sizes.tolist() == sorted(sizes, reverse=True)
    skills = np.asarray([row["skill"] for row in rows])
    pure = sum(Counter(skills[found == number]).most_common(1)[0][1] for number in range(6))
    assert pure >= 0.95 * len(rows)


def test_equal_prompts_are_one_cluster():
    features = np.repeat([[1.0, 2.0], [-3.0, 1.0]], [3, 5], axis=0)
    assert cluster(features, 4, seed=0).tolist() == [1] * 3 + [0] * 5


# ------------------------------------------------------------------------------------- the draws


def made_map(digest="", gaps=(2.0, 0.5, 0.0), sizes=(10, 40, 6)):
    groups = tuple(
        Group(str(i), size, 2, gap, 0.0, ("a",)) for i, (gap, size) in enumerate(zip(gaps, sizes, strict=True))
    )
    order = np.random.default_rng(0).permutation(np.repeat(range(len(sizes)), sizes))
    return PromptMap("recovery", "s", digest, {}, groups, tuple(order.tolist()))


def test_draws_are_in_proportion_to_size_times_gap():
    assert made_map().draws() == [28, 28, 0], "20 and 20 of 56"
    assert made_map(gaps=(1.0, 1.0, 1.0)).draws() == [10, 40, 6]
    assert sum(made_map(gaps=(0.3, 0.21, 0.77)).draws()) == 56
    with pytest.raises(UserError, match="no gap above 0"):
        made_map(gaps=(0.0, 0.0, 0.0)).draws()


def test_a_file_that_is_no_map(tmp_path):
    file = tmp_path / "map.json"
    maps.write(file, made_map())
    assert maps.read(file, "f") == made_map()
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"groups": values["groups"][:1]}))
    with pytest.raises(UserError, match="names groups that it does not have"):
        maps.read(file, "f")
    file.write_text("{}")
    with pytest.raises(UserError, match="f: .*map.json is not a map"):
        maps.read(file, "f")
    with pytest.raises(UserError, match="f: cannot read .*none.json"):
        maps.read(tmp_path / "none.json", "f")


@pytest.mark.slow
def test_a_run_that_weights_by_gap_makes_the_map_once_and_resumes(command, tmp_path):
    """Six batches of 16 have the shares of the map up to two prompts; a resumed run and one with the file are equal."""
    recovery = "--config.branches.recovery.prompts"
    flags = [*SMALL, "--config.checkpoints.every=2", f"{recovery}.limit=160"]
    once = tmp_path / "once"
    ended = command("train", f"--workdir={once}", *flags, f"{recovery}.weights=gap")
    assert ended.code == 0, ended.err
    made = maps.read(once / "prompt_map_recovery.json", "f")
    draws = made.draws()
    file = tmp_path / "map.json"
    ended = command("prompts", "map", PAPER_CONFIG, f"{recovery}.limit=160",
                    "--config.rollout.batch_size=16", "--config.optimizer.micro_batch=8", f"--out={file}")  # fmt: skip
    assert ended.code == 0 and "nats per token" in ended.out, ended.err
    assert maps.read(file, "f") == made, "the command and the run make the same map"
    served = [row["index"] for row in read_lines(once / "selection.jsonl") if row["phase"] == "recovery"]
    taken = Counter(made.group_of[index] for step in served for index in step)
    for number, count in enumerate(draws):
        assert abs(taken[number] - count / 160 * 16 * len(served)) < 2
    again = tmp_path / "again"
    shutil.copytree(once, again)
    for step in (6, 8):
        shutil.rmtree(again / "checkpoints" / str(step))
    ended = command("train", f"--workdir={again}", *flags, f"{recovery}.weights=gap")
    assert ended.code == 0 and "continuing from step 4" in ended.out, ended.err
    same_weights(once, again)
    given = tmp_path / "given"
    assert command("train", f"--workdir={given}", *flags, f"{recovery}.weights={file}").code == 0
    same_weights(once, given)
    edited = dataclasses.replace(made, groups=made.groups[::-1])
    maps.write(again / "prompt_map_recovery.json", edited)
    one_line(command("train", f"--workdir={again}", *flags, f"{recovery}.weights=gap"), "recovery")
    other = [flag.replace("limit=160", "limit=159") for flag in flags]
    one_line(
        command("train", f"--workdir={tmp_path / 'other'}", *other, f"{recovery}.weights={file}"),
        "config.branches.recovery.prompts.weights", "made for other prompts",
    )  # fmt: skip
