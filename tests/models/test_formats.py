"""Folders and names that are no Hugging Face checkpoint: one line says what they are and what to do."""

import pytest

from camopd_jax.errors import UserError
from camopd_jax.models import hf
from camopd_jax.models.disk import find_folder
from camopd_jax.models.names import check_names

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["model-q4_k_m.gguf"], "model-q4_k_m.gguf is for inference"),
        (["global_step9/mp_rank_00_model_states.pt", "latest"], r"DeepSpeed checkpoint; run `python zero_to_fp32.py"),
        (["pytorch_model_fsdp_0/__0_0.distcp", "training_args.bin"], "FSDP checkpoint; run `accelerate merge-weights"),
        (["__0_0.distcp"], "FSDP checkpoint"),
        (["model_world_size_8_rank_0.pt"], "verl checkpoint; run `python -m verl.model_merger"),
        (["consolidated.safetensors", "params.json"], "Mistral's own format; give the Hugging Face version"),
        (["consolidated.00.pth", "params.json"], "Mistral's own format"),
        (["model-00001-of-00002.safetensors"], "index.json is missing; fetch that file too"),
        (["model.fp16.safetensors"], "rename it to model.safetensors"),
        (["model.safetensors.incomplete"], "a download that did not end"),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"], "is a pickle, .*; convert it"),
        (["training_args.bin", "optimizer.pt", "checkpoint-9/config.json", "checkpoint-9/optimizer.bin"], None),
        (["optimizer_0/__0_0.distcp"], None),
    ],
)
def test_other_formats_are_named_with_or_without_a_config(names, says, tmp_path):
    folder = tmp_path / "optimizer"  # a name of the folder itself means nothing
    make(folder, *names)
    with pytest.raises(UserError, match=says or "give a Hugging Face folder with safetensors") as caught:
        hf.tensors(folder)
    assert str(caught.value).startswith(f"{folder}: no model.safetensors and no ")
    with pytest.raises(UserError, match=says or "config.json is missing; give "):
        hf.read_config(folder)


@pytest.mark.parametrize("inside", ["checkpoint-9", "export", "snapshots/ab12"])
def test_a_checkpoint_in_a_sub_folder_is_named(inside, tmp_path):
    make(tmp_path, f"{inside}/config.json", f"{inside}/model.safetensors")
    with pytest.raises(UserError, match=f"config.json is missing; give the folder {tmp_path / inside}$"):
        hf.read_config(tmp_path)


def test_a_link_to_nothing_a_folder_and_a_pointer(tmp_path):
    file = tmp_path / "model.safetensors"
    file.symlink_to("blobs/ab12")
    with pytest.raises(UserError, match="model.safetensors is a link to a file that does not exist"):
        hf.tensors(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"model.safetensors: cannot read it \(Is a directory\)"):
        hf.tensors(tmp_path)
    (tmp_path / "config.json").write_text(LFS)
    with pytest.raises(UserError, match=r"config.json: not readable as JSON \(a pointer of Git LFS: run `git lfs"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("https://huggingface.co/Qwen/Qwen3-8B/tree/main", "is a web page; give the hub name Qwen/Qwen3-8B$"),
        ("gs://bucket/model", "is a URL; give the path of a local folder"),
        ("file:///models/a", "is a URL; give the path of a local folder"),
        (__file__, "is a file; give a Hugging Face folder"),
    ],
)
def test_names_that_are_no_folder(name, says):
    with pytest.raises(UserError, match=f"--model: {name} {says}"):
        find_folder(name, "--model")


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ("v_head.summary.bias", "tensor v_head.summary.bias belongs to a value head; save the `pretrained_model`"),
        ("score.weight", "score.weight belongs to the head of a classifier or reward model; give a language model"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", r"lora_A.weight .* is not a model's; call merge_and_unload"),
        ("model.layers.0._fsdp_wrapped_module.x.weight", r"not a model's; save the complete state dict of the FSDP"),
        ("model.layers.0._checkpoint_wrapped_module.x.weight", "save the model without the wrappers"),
        ("layers.0.attention.wq.weight", "Mistral's own format"),
        ("model.layers.0.strange.weight", "config.json and weights belong to different models"),
        ("_fsdp_wrapped_module.model.norm.weight", "names of tensors begin with .*; save the complete state dict of"),
        ("pretrained_model.model.norm.weight", "begin with 'pretrained_model.' .*; save the `pretrained_model`"),
    ],
)
def test_tensors_that_are_no_model_s(tensor, says, tmp_path):
    present = {tensor} if tensor.endswith("model.norm.weight") else {tensor, "model.norm.weight"}
    with pytest.raises(UserError, match=says):
        check_names(present, {"model.norm.weight"}, tmp_path)
