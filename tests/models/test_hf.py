"""Hugging Face folders: byte-identical round trips, and one line for each mistake."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
from rows import edit_json
from safetensors.numpy import load_file, save_file

from camopd_jax.errors import UserError
from camopd_jax.models import hf
from camopd_jax.models.config import from_hf
from camopd_jax.models.weights import check_rows_cover, shardings, table
from camopd_jax.runtime.mesh import make_mesh


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=1, devices=jax.devices()[:1])


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of a checkpoint that a test may damage."""
    return shutil.copytree(checkpoint("smollm2")[1], tmp_path / "model")


def read(folder, mesh):
    config = from_hf(hf.read_config(folder), where=str(folder / "config.json"))
    return config, hf.load(folder, config, mesh, "float32")


def raw(folder):
    """{name: (dtype, shape, bytes)} of all tensors."""
    return {name: (t.dtype, t.shape, t.map().tobytes()) for name, t in hf.tensors(folder).items()}


def recast(folder, dtype):
    """Rewrites the weights: matrices in `dtype`, vectors in float32."""
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.astype(dtype) if t.ndim > 1 else t for n, t in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
def test_round_trip_is_byte_for_byte(family, max_shard_bytes, checkpoint, mesh, tmp_path):
    source = checkpoint(family)[1]
    config, params = read(source, mesh)
    hf.save(tmp_path, params, config, hf.read_config(source), hf.tensor_dtypes(source, config), max_shard_bytes)
    assert raw(tmp_path) == raw(source)
    assert hf.read_config(tmp_path) == hf.read_config(source)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_bytes < 2**30)
    assert hf.fingerprint(tmp_path) == hf.fingerprint(source)
    read(tmp_path, mesh)  # and sharded files load


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_mixed_dtypes_are_kept(dtype, folder, mesh, tmp_path):
    recast(folder, dtype)
    config, params = read(folder, mesh)
    out = tmp_path / "out"
    out.mkdir()
    hf.save(out, params, config, hf.read_config(folder), hf.tensor_dtypes(folder, config))
    assert {t.dtype for t in hf.tensors(out).values()} == {np.dtype(dtype), np.dtype(np.float32)}
    assert raw(out) == raw(folder)


def test_a_tied_head_in_the_file_must_equal_the_embedding(folder, mesh, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    twin = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    save_file(twin, folder / "model.safetensors")
    config, params = read(folder, mesh)
    out = tmp_path / "out"
    out.mkdir()
    hf.save(out, params, config, hf.read_config(folder), hf.tensor_dtypes(folder, config))
    assert raw(out) == raw(folder)
    save_file(twin | {"lm_head.weight": twin["lm_head.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings is true, but lm_head.weight differs"):
        read(folder, mesh)


def test_loading_onto_a_mesh_reads_each_shard(checkpoint, mesh):
    folder = checkpoint("qwen3")[1]
    config, params = read(folder, mesh)
    eight = make_mesh(data=2, fsdp=2, tensor=2)
    pieces = hf.load(folder, config, eight, "float32")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(pieces), jax.device_get(params))
    jax.tree.map(
        lambda array, place: array.sharding == place or pytest.fail(str(place)), pieces, shardings(config, eight)
    )


def test_every_parameter_has_a_row(checkpoint, mesh):
    config, params = read(checkpoint("qwen2")[1], mesh)
    check_rows_cover(params, config)
    with pytest.raises(KeyError, match="final_norm"):
        check_rows_cover({k: v for k, v in params.items() if k != "final_norm"}, config)
    with pytest.raises(KeyError, match="extra"):
        check_rows_cover(params | {"extra": np.zeros(1)}, config)


def test_row_example():
    row = next(r for r in table(from_hf(CONFIG)) if r.path[-2:] == ("query", "kernel"))
    tensor = np.arange(6 * 14 * 60).reshape(84, 60)
    parameter = row.from_hf(tensor)
    assert parameter.shape == (60, 6, 14)
    assert parameter[7, 2, 3] == tensor[2 * 14 + 3, 7]
    np.testing.assert_array_equal(row.to_hf(parameter), tensor)


CONFIG = dict(
    model_type="llama",
    vocab_size=98,
    hidden_size=60,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=14,
)


# ------------------------------------------------------------------------------------ mistakes


def spoil(folder, **tensors):
    """Sets tensors of the file (names with __ for a dot); None removes a tensor."""
    values = load_file(folder / "model.safetensors") | {k.replace("__", "."): v for k, v in tensors.items()}
    save_file({k: v for k, v in values.items() if v is not None}, folder / "model.safetensors")


def refused(folder, mesh, message):
    with pytest.raises(UserError, match=message) as caught:
        read(folder, mesh)
    assert "\n" not in str(caught.value)


def test_missing_tensor(folder, mesh):
    spoil(folder, model__norm__weight=None)
    refused(folder, mesh, "model: tensor model.norm.weight is missing")


def test_a_tensor_that_was_not_gathered(folder, mesh):
    spoil(folder, model__norm__weight=np.zeros(0, np.float32))
    refused(
        folder, mesh, "tensor model.norm.weight is empty: DeepSpeed .ZERO 3. saved it without".replace("ZERO", "ZeRO")
    )


@pytest.mark.parametrize(
    ("field", "value", "method"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"load_in_4bit": True}, "None"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("quantization", {"group_size": 64, "bits": 4}, "None"),
    ],
)
def test_quantised_checkpoints_are_refused_by_their_method(field, value, method, folder, mesh):
    edit_json(folder / "config.json", **{field: value})
    refused(
        folder, mesh, rf"config.json: {field} says that the checkpoint is quantised \({method}\); give the original"
    )


def test_code_that_is_not_the_models(folder):
    before = hf.read_config(folder)
    for code in ({}, {"AutoTokenizer": ["a.B", None]}, {"AutoModelForSequenceClassification": "a.B"}):
        edit_json(folder / "config.json", auto_map=code)
        assert hf.read_config(folder) == before


def test_extra_tensor(folder, mesh):
    spoil(folder, model__adapter=np.zeros(3, np.float32))
    refused(folder, mesh, "tensor model.adapter .* has no place")


def test_tensor_of_wrong_shape(folder, mesh):
    spoil(folder, model__norm__weight=np.zeros(71, np.float32))
    refused(folder, mesh, r"tensor model.norm.weight has shape \[71\], config.json asks for \[72\]")


def test_wrong_dtype(folder, mesh):
    spoil(folder, model__norm__weight=np.zeros(72, np.int8))
    refused(folder, mesh, "dtype I8; only F32, F16, BF16, F64 are read")


def test_truncated_file(folder, mesh):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(folder, mesh, "model.safetensors is cut short at tensor")


@pytest.mark.parametrize(
    "content", [b"", b"garbage, not safetensors", b"\xff" * 100, (5).to_bytes(8, "little") + b"[1,2]"]
)
def test_no_safetensors(content, folder, mesh):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, mesh, "is not a safetensors file")


def test_pickles_are_refused(folder, mesh):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, mesh, "pytorch_model.bin is a pickle")


def test_empty_folder(folder, mesh):
    (folder / "model.safetensors").unlink()
    refused(folder, mesh, "no model.safetensors and no model.safetensors.index.json")


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"a": [0, 8], "b": [4, 12]}, "invalid offset"),  # both claim four bytes
        ({"a": [0, 8], "b": [12, 20]}, "invalid offset"),  # a gap
        ({"a": [0, 8]}, "not fully covered"),  # four bytes that are no tensor's
        ({"a": [0, 12], "b": [12, 20]}, r"tensor a has 12 bytes for shape \[2\]"),
    ],
)
def test_a_file_whose_tensors_do_not_lie_one_behind_the_other(layout, says, folder, mesh):
    entries = {name: {"dtype": "F32", "shape": [2], "data_offsets": offsets} for name, offsets in layout.items()}
    header = json.dumps(entries).encode()
    end = max(stop for _, stop in layout.values()) + 4 * (len(layout) == 1)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))
    refused(folder, mesh, f"model.safetensors is not a safetensors file: .*{says}.*; fetch the checkpoint again")


def test_a_pointer_of_git_lfs(folder, mesh):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 56\n")
    refused(folder, mesh, "a pointer of Git LFS: run `git lfs pull`")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite(value, folder, mesh):
    kernel = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].copy()
    kernel[3, 5] = value
    spoil(folder, model__layers__1__mlp__up_proj__weight=kernel)
    refused(folder, mesh, "model.safetensors: tensor model.layers.1.mlp.up_proj.weight has values that are not finite")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", "weights.bin"])
def test_index_with_a_file_outside_the_folder(name, folder, mesh):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refused(folder, mesh, "only .safetensors files beside it are read")


def test_index_with_missing_tensors(folder, mesh):
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "model-2.safetensors")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}))
    refused(folder, mesh, "model-1.safetensors is missing")
    index.write_text(json.dumps({"weight_map": {"unheard.of": "model-2.safetensors"}}))
    refused(folder, mesh, "tensor unheard.of is in none of the files")


def test_remote_code(folder, mesh):
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    refused(folder, mesh, "auto_map asks for code")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    refused(folder, mesh, "auto_map asks for code")  # this model is a Llama


def test_code_that_transformers_has_in_the_meantime_is_not_needed(checkpoint, mesh, tmp_path):
    """As in the checkpoints of Phi-3 and Phi-4-mini."""
    folder = shutil.copytree(checkpoint("phi3")[1], tmp_path / "model")
    code = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    edit_json(folder / "config.json", auto_map=code, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False)
    read(folder, mesh)
    assert "auto_map" not in hf.read_config(folder)
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Phi3ForCausalLM"})
    refused(folder, mesh, "auto_map asks for code")
    edit_json(folder / "config.json", auto_map=code, full_attn_mod=2)
    refused(folder, mesh, "field full_attn_mod is 2; phi3 supports only 1")


def test_parts_of_a_tensor_are_stored_in_their_order(checkpoint, mesh, tmp_path):
    """qkv_proj of Phi-3: queries of 6 heads of 10, keys of 2, values of 2."""
    folder = checkpoint("phi3")[1]
    params = read(folder, mesh)[1]
    stored = load_file(folder / "model.safetensors")["model.layers.1.self_attn.qkv_proj.weight"]
    attention = params["layers"]["attention"]
    parts = [np.asarray(attention[name]["kernel"])[1].reshape(60, -1).T for name in ("query", "key", "value")]
    assert [len(part) for part in parts] == [60, 20, 20]
    np.testing.assert_array_equal(np.concatenate(parts), stored)
    tensors = load_file(folder / "model.safetensors")
    short = shutil.copytree(folder, tmp_path / "short")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    save_file(tensors | {name: tensors[name][:-1]}, short / "model.safetensors")
    refused(short, mesh, r"qkv_proj.weight has shape \[99, 60\], config.json asks for \[100, 60\]")


def test_config_missing_or_broken(folder, mesh):
    (folder / "config.json").write_text("{")
    refused(folder, mesh, "config.json: not readable as JSON")
    (folder / "config.json").write_text("[1]")
    refused(folder, mesh, "config.json: must hold a JSON object")
    (folder / "config.json").write_text("[" * 100_000)
    refused(folder, mesh, "config.json: not readable as JSON")
    (folder / "config.json").unlink()
    refused(folder, mesh, "config.json is missing")


def test_a_peft_adapter_is_not_a_model(folder, mesh):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(folder, mesh, r"adapter_config.json: a PEFT adapter, .*merge_and_unload\(\)")
    (folder / "config.json").unlink()
    refused(folder, mesh, "adapter_config.json: a PEFT adapter")


def test_mesh_that_does_not_divide_the_heads(folder):
    config = from_hf(hf.read_config(folder))
    with pytest.raises(UserError, match="config.mesh.tensor is 2, which does not divide the model's heads = 9"):
        hf.load(folder, config, make_mesh(data=4, tensor=2), "float32")


def test_loading_needs_memory_for_one_stacked_parameter_besides_the_model(tmp_path):
    """A separate process reads a bfloat16 checkpoint of 24 layers in float32, and its memory is measured."""
    script = f"""
        import json, sys, threading, time
        from pathlib import Path
        import jax, ml_dtypes, numpy as np
        from safetensors.numpy import save_file
        from camopd_jax.models import hf
        from camopd_jax.models.config import from_hf
        from camopd_jax.models.weights import table
        from camopd_jax.runtime.mesh import make_mesh

        folder, layers = Path({str(tmp_path)!r}), 24
        config = from_hf(dict(model_type="llama", vocab_size=1000, hidden_size=512, intermediate_size=1536,
                              num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8))
        shapes = {{name: row.hf_shape for row in table(config) for name in row.names(layers)}}
        save_file({{n: np.ones(s, ml_dtypes.bfloat16) for n, s in shapes.items()}}, folder / "model.safetensors")

        def held():  # MiB that are this process's own, without the mapped file
            return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024

        def watch():
            while not done:
                peaks.append(held())
                time.sleep(0.001)

        mesh = make_mesh(devices=jax.devices()[:1])
        jax.block_until_ready(jax.device_put(np.zeros(8)))
        before, peaks, done = held(), [], False
        watcher = threading.Thread(target=watch)
        watcher.start()
        params = jax.block_until_ready(hf.load(folder, config, mesh, "float32"))
        done = True
        watcher.join()
        sizes = [x.nbytes / 2**20 for x in jax.tree.leaves(params)]
        print(json.dumps([sum(sizes), max(sizes), max(peaks) - before]))
    """
    environment = os.environ | {"XLA_FLAGS": "", "MALLOC_MMAP_THRESHOLD_": "65536"}
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    model, stacked, peak = json.loads(ended.stdout.splitlines()[-1])
    assert model > 300 and 70 < stacked < 80
    assert model * 0.9 < peak < model + 1.5 * stacked, "on a CPU the model itself is in the process's memory"
