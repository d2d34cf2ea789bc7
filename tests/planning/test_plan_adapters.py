"""The plan of a run with adapters: one set of base weights, and the shapes that the run itself has."""

import jax
import numpy as np
import peft
import pytest
import transformers
from quickstart import QUICKSTART

from camopd_jax.config.schema import Adapter, BranchConfig, Compute, Stream, TrainConfig
from camopd_jax.method.branches import load_models
from camopd_jax.method.setup import resolve
from camopd_jax.models.weights import LORA_A
from camopd_jax.planning.arrays import chip_bytes, plan
from camopd_jax.planning.costs import memory_estimate, weights
from camopd_jax.planning.programs import programs, residents
from camopd_jax.planning.report import read_models

BASE = 52 * 96 + 96 + 3 * (2 * 96 + 4 * 96 * 96 + 3 * 96 * 256)  # parameters of the quickstart's models
# Of rank 5 on q_proj and up_proj in 3 layers, and 3 scales for each
MATRICES, SCALES = 3 * 5 * (96 + 96 + 96 + 256), 2 * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A PEFT adapter of the generalist."""
    model = transformers.AutoModelForCausalLM.from_pretrained(QUICKSTART / "generalist")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=5, target_modules=["q_proj", "up_proj"])
    folder = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(model, settings).save_pretrained(folder)
    return folder


def configured(specialised, **fields):
    branches = {
        "recovery": BranchConfig(prompts=Stream("g"), teacher="general"),
        "review": BranchConfig(prompts=Stream("d"), teacher="specialised"),
    }
    return TrainConfig(str(QUICKSTART / "generalist"), str(specialised), branches, **fields)


def planned(config):
    """The models and the plan on one device."""
    models = read_models(config, None, None)
    return models, plan(config, models, jax.devices()[:1])


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype.name), tree)


@pytest.mark.parametrize("teacher, item", [("float32", 4), ("bfloat16", 2)])
def test_an_adapter_on_the_original_needs_the_base_once(folder, teacher, item):
    config = configured(folder, compute=Compute(teacher=teacher))
    models, made = planned(config)
    assert weights(models.shapes["general"]) == BASE and weights(models.student) == BASE + MATRICES + SCALES
    run = load_models(resolve(config, jax.devices()[:1]))
    matrices = {name: leaf for name, leaf in flat(made.params).items() if "lora_scale" not in name}
    real = flat(run.student.params)
    assert {name: (x.shape, x.dtype.name) for name, x in matrices.items()} == {
        name: (real[name].shape, real[name].dtype.name) for name in matrices
    }
    assert shapes(made.state.params).keys() == {"layers"} and chip_bytes(made.state.params) == 4 * MATRICES
    several = programs(made)
    kept = residents(made, several)
    assert kept["parameters"] == BASE * item + MATRICES * 4 + SCALES * 4
    assert kept["general_teacher"] == 0 and kept["specialised_teacher"] == (MATRICES + SCALES) * item
    assert kept["optimizer"] == 2 * 4 * MATRICES + 8
    (decode,) = (program for program in several if program.name == "decode")
    assert not any(LORA_A in name for name in flat(decode.args[1])), "decoding has merged weights"
    estimate = memory_estimate(made.setup, models)["update"]
    trained = 4 * MATRICES  # gradient, two moments, parameters
    np.testing.assert_allclose(estimate, BASE * item + 4 * trained + 4 * SCALES + (MATRICES + SCALES) * item)


def test_an_adapter_with_more_tokens_has_its_own_embedding_and_head(tmp_path):
    """The base keeps its rows; the domain teacher and the student have those of the adapter, which they share."""
    model = transformers.AutoModelForCausalLM.from_pretrained(QUICKSTART / "generalist")
    model.resize_token_embeddings(59, mean_resizing=False)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=5, target_modules=["q_proj", "up_proj"])
    peft.get_peft_model(model, settings).save_pretrained(tmp_path)
    config = configured(tmp_path)
    models, made = planned(config)
    before = live_bytes()
    run = load_models(resolve(config, jax.devices()[:1]))
    own, matrices = 4 * 59 * 96, 4 * MATRICES
    assert live_bytes() - before == 4 * BASE + own + 2 * matrices + 4 * SCALES
    for name, ours in {"student": made.params, "specialised": made.teachers["specialised"][1]}.items():
        assert shapes(flat(getattr(run, name).params)) == shapes(flat(ours))
    kept = residents(made, programs(made))
    assert kept["parameters"] + kept["general_teacher"] == 4 * BASE + own + matrices + 4 * SCALES
    assert memory_estimate(made.setup, models)["update"] == 4 * BASE + own + 5 * matrices + 8 * SCALES
    assert run.student.reader.vocab_size == 59 and run.student.model.config.output_vocab_size == 52


def test_a_new_adapter_shares_the_specialised_model():
    config = configured(QUICKSTART / "specialist", adapter=Adapter(rank=5, targets=("q_proj", "up_proj")))
    models, made = planned(config)
    kept = residents(made, programs(made))
    assert kept["parameters"] == BASE * 4 + (MATRICES + SCALES) * 4
    assert kept["general_teacher"] == BASE * 4 and kept["specialised_teacher"] == 0
    estimate = memory_estimate(made.setup, models)["update"]
    assert estimate == 2 * BASE * 4 + 4 * 4 * MATRICES + 4 * SCALES


def test_an_adapter_on_the_original_in_int8(folder):
    """The arrays of a run on one device: matrices in a byte, a float32 scale for each output, the rest in float32."""
    config = configured(folder, compute=Compute(teacher="int8"))
    models, made = planned(config)
    matrices, outputs = 3 * (4 * 96 * 96 + 3 * 96 * 256), 3 * (4 * 96 + 2 * 256 + 96)
    base, adapter = matrices + 4 * outputs + 4 * (BASE - matrices), 4 * (MATRICES + SCALES)
    assert chip_bytes(made.params) == base + adapter
    gradient = 4 * MATRICES  # as the two moments
    assert memory_estimate(made.setup, models)["update"] == base + 2 * adapter + 3 * gradient
    before = live_bytes()
    run = load_models(resolve(config, jax.devices()[:1]))
    assert live_bytes() - before == base + 2 * adapter - 4 * SCALES  # teacher and student have one array of scales
    assert shapes(flat(run.student.params)) == shapes(flat(made.params))
    assert run.general.params["layers"]["mlp"]["up"]["kernel"] is run.student.params["layers"]["mlp"]["up"]["kernel"]


def test_teachers_in_int8_beside_a_student_that_is_trained_in_full():
    config = configured(QUICKSTART / "specialist", compute=Compute(teacher="int8"))
    models, made = planned(config)
    run = load_models(resolve(config, jax.devices()[:1]))
    for name, ours in {"student": made.params, **{name: of[1] for name, of in made.teachers.items()}}.items():
        assert shapes(flat(getattr(run, name).params)) == shapes(flat(ours))
    assert chip_bytes(made.params) == 4 * BASE and chip_bytes(made.state.params) == 4 * BASE
    teacher = chip_bytes(made.teachers["general"][1])
    assert memory_estimate(made.setup, models)["update"] == 4 * 4 * BASE + 2 * teacher < 6 * 4 * BASE


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def flat(tree):
    """Leaves by name."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
