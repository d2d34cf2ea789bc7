"""Checkpoints: identical bits, other meshes, kills, and errors for damaged files."""

import asyncio
import dataclasses
import gc
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from camopd_jax.config.schema import Checkpoints
from camopd_jax.errors import UserError
from camopd_jax.runs.array_handler import _when_all_have_ended
from camopd_jax.runs.checkpoint import CheckpointStore, DamagedCheckpoint, checkpoints_folder
from camopd_jax.runs.digests import digests
from camopd_jax.runtime.mesh import make_mesh
from camopd_jax.types import TrainState

POSITIONS = {"general": {"next": 17, "epoch": 2}, "domain": {"next": 5, "epoch": 0}}
PROVENANCE = {"general_model": "somewhere", "general_fingerprint": "0123abcd"}


def state_at(step, place=lambda array, *axes: jnp.asarray(array), width=40):
    """A small state whose values depend on the step, with bfloat16 parameters and float32 moments."""
    values = np.random.default_rng(step).standard_normal((16, width)).astype(np.float32)
    values[0, :4] = np.nan, np.inf, -0.0, 1e-45
    params = {
        "block": {"kernel": place(values.astype(jnp.bfloat16), "fsdp", "tensor")},
        "norm": place(values[1], "tensor"),
    }
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), params)
    adam = optax.ScaleByAdamState(
        count=place(np.int32(step)),
        mu=jax.tree.map(lambda p: place(np.full(p.shape, step, p.dtype)), like),
        nu=jax.tree.map(lambda p: place(np.full(p.shape, step**2, p.dtype)), like),
    )
    return TrainState(place(np.int32(step)), params, {"shared": adam})


def on_mesh(fsdp, tensor):
    mesh = make_mesh(8 // (fsdp * tensor), fsdp, tensor)
    return lambda array, *axes: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def open_at(workdir, config=Checkpoints(), ranks=None):
    return CheckpointStore(str(workdir), config, {} if ranks is None else ranks)


def save(workdir, step, config=Checkpoints(), ranks=None, **kwargs):
    checkpoints = open_at(workdir, config, ranks)
    checkpoints.save(step, state_at(step, **kwargs), POSITIONS, PROVENANCE)
    checkpoints.wait()
    checkpoints.close()
    return checkpoints.steps()


# ------------------------------------------------------------------------------ save and restore


def test_another_mesh_gets_the_same_bits(tmp_path):
    save(tmp_path, 3, place=on_mesh(fsdp=2, tensor=4))
    like = state_at(0, place=on_mesh(fsdp=8, tensor=1))
    state, positions, provenance = open_at(tmp_path).restore(3, like)
    same_bits(state, state_at(3))
    for restored, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert restored.sharding == wanted.sharding
    assert (positions, provenance) == (POSITIONS, PROVENANCE)


def test_a_stored_gradient_is_restored(tmp_path):
    """As `branches.NAME.project_against` adds to the moments."""
    state = state_at(3)
    state = state.replace(moments=state.moments | {"gradient@review": state.moments["shared"].mu})
    checkpoints = open_at(tmp_path)
    checkpoints.save(3, state, POSITIONS, PROVENANCE)
    checkpoints.wait()
    same_bits(checkpoints.restore(3, jax.tree.map(jnp.zeros_like, state))[0], state)


def test_an_update_during_a_save_does_not_change_the_checkpoint(tmp_path):
    update = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = state_at(1, width=40_000)
    checkpoints = open_at(tmp_path)
    checkpoints.save(1, state, POSITIONS, PROVENANCE)
    for _ in range(3):
        state = update(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    same_bits(checkpoints.restore(1, state)[0], state_at(1, width=40_000))


def test_an_existing_checkpoint_is_not_changed(tmp_path):
    save(tmp_path, 1)
    checkpoints = open_at(tmp_path)
    checkpoints.save(1, state_at(2), {}, {})
    checkpoints.wait()
    same_bits(checkpoints.restore(1, state_at(0))[0], state_at(1))


# --------------------------------------------------------------------------------- what is kept


def test_keeps_the_last_and_the_best_over_restarts(tmp_path):
    config = Checkpoints(keep_last=2, keep_best=1)
    worth = {1: 0.5, 2: 0.9, 4: 0.7, 5: 0.1}
    kept, ranks = [], {}
    for step in range(1, 7):  # a step is evaluated after it was saved
        kept.append(save(tmp_path, step, config, ranks))
        ranks |= {step: worth[step]} if step in worth else {}
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6]]
    checkpoints = open_at(tmp_path, config, ranks)
    assert (checkpoints.latest(), checkpoints.best()) == (6, 2)


def test_of_equal_ranks_the_last_step_is_best(tmp_path):
    ranks = {1: 0.5, 2: 0.5}
    config = Checkpoints(keep_last=1, keep_best=1)
    assert [save(tmp_path, step, config, ranks) for step in (1, 2, 3)] == [[1], [2], [2, 3]]
    assert open_at(tmp_path, config, ranks).best() == 2


def test_without_ranks_only_the_last_checkpoints_are_kept(tmp_path):
    config = Checkpoints(keep_last=1, keep_best=3)
    assert open_at(tmp_path, config).latest() is None
    assert [save(tmp_path, step, config) for step in (1, 2, 3)] == [[1], [2], [3]]
    assert open_at(tmp_path, config).best() is None


# -------------------------------------------------------------------------------- failures


def test_kill_in_the_middle_of_a_save(tmp_path):
    """The previous checkpoint stays; the incomplete one is ignored and can be written again."""
    save(tmp_path, 1)
    script = f"""
        import os, signal, threading, time
        from pathlib import Path
        import jax.numpy as jnp, numpy as np
        from camopd_jax.runs.checkpoint import CheckpointStore
        from camopd_jax.config.schema import Checkpoints
        from camopd_jax.types import TrainState

        def kill_when_half_written():
            while not list(Path({str(tmp_path)!r}, "checkpoints").glob("2.*/state*/*/*")):
                time.sleep(0.0005)
            os.kill(os.getpid(), signal.SIGKILL)

        params = {{"kernel": jnp.asarray(np.random.default_rng(0).standard_normal(2**23, np.float32))}}
        checkpoints = CheckpointStore({str(tmp_path)!r}, Checkpoints(), {{}})
        threading.Thread(target=kill_when_half_written, daemon=True).start()
        checkpoints.save(2, TrainState(jnp.int32(2), params, {{}}), {{}}, {{}})
        checkpoints.wait()
        time.sleep(60)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)]).returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "checkpoints").glob("2*")] == ["2.orbax-checkpoint-tmp"]

    checkpoints = open_at(tmp_path)
    assert (checkpoints.steps(), checkpoints.latest()) == ([1], 1)
    same_bits(checkpoints.restore(1, state_at(0))[0], state_at(1))
    assert save(tmp_path, 2) == [1, 2]
    same_bits(open_at(tmp_path).restore(2, state_at(0))[0], state_at(2))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    save(workdir, 7)
    return workdir


def cut_data(folder):
    for file in folder.glob("state/**/d/*"):
        file.write_bytes(file.read_bytes()[:-7])


def flip_a_bit(folder):
    for file in folder.glob("state/**/d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        cut_data,
        flip_a_bit,
        lambda folder: shutil.rmtree(folder / "state"),
        lambda folder: shutil.rmtree(folder / "positions"),
    ],
    ids=["cut", "bit", "no state", "no positions"],
)
def test_a_broken_checkpoint(whole, tmp_path, damage):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints/7")
    with pytest.raises(DamagedCheckpoint, match=r"checkpoints/7: this checkpoint cannot be read \(.+\)") as e:
        open_at(tmp_path).restore(7, state_at(0))
    assert "\n" not in str(e.value)


def test_no_flipped_byte_passes_unseen(whole, tmp_path):
    """Of every file of a checkpoint, one byte in the middle: refused, or without effect on what is read."""
    refused = 0
    for file in sorted(f for f in (whole / "checkpoints/7").rglob("*") if f.is_file() and f.stat().st_size):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
        damaged = tmp_path / file.relative_to(whole)
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 4
        damaged.write_bytes(data)
        try:
            state, positions, provenance = open_at(tmp_path).restore(7, state_at(0))
        except UserError:
            refused += 1
            continue
        same_bits(state, state_at(7))
        assert (positions, provenance) == (POSITIONS, PROVENANCE), file
    assert refused >= 3


@pytest.mark.parametrize("shape", [(2, 4), (8, 1)])
def test_digests_depend_on_every_number_and_on_no_mesh(shape):
    made = digests(state_at(7, place=on_mesh(*shape)), POSITIONS, PROVENANCE)
    assert made == digests(state_at(7), POSITIONS, PROVENANCE)
    values = np.random.default_rng(0).integers(0, 2**32, (5, 7), dtype=np.uint32)
    params = {"w": jnp.asarray(values.view(np.float32))}
    number = np.arange(35, dtype=np.uint64).reshape(5, 7)
    by_hand = [int(np.sum(values, dtype=np.uint64) % 2**32), int(np.sum(values * (2 * number + 1)) % 2**32)]
    assert digests(TrainState(jnp.int32(0), params, {}), {}, {})["params/w"] == by_hand


def test_a_damaged_checkpoint_is_set_aside(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 7)
    cut_data(tmp_path / "checkpoints/7")
    checkpoints = open_at(tmp_path)
    assert checkpoints.set_aside(7) == str(tmp_path / "damaged_checkpoint_7")
    assert checkpoints.latest() == 3 and (tmp_path / "damaged_checkpoint_7/state").is_dir()
    same_bits(checkpoints.restore(3, state_at(0))[0], state_at(3))


@pytest.mark.parametrize("damage", [cut_data, flip_a_bit], ids=["cut", "bit"])
def test_many_failing_reads_give_one_error(tmp_path, damage, monkeypatch):
    save(tmp_path, 7, place=on_mesh(fsdp=2, tensor=4))
    damage(tmp_path / "checkpoints/7")
    checkpoints, like = open_at(tmp_path), state_at(0, place=on_mesh(fsdp=8, tensor=1))
    unseen = []
    monkeypatch.setattr(sys, "unraisablehook", unseen.append)
    monkeypatch.setattr(sys, "excepthook", lambda *error: unseen.append(error))
    for _ in range(10):
        with pytest.raises(UserError):
            checkpoints.restore(7, like)
    assert unseen == []


def test_an_error_waits_for_reads_that_start_after_it():
    """The second array is opened after the first one's error; one of its three shards fails, then two others end."""
    ended = []

    async def shard(ticks):
        await asyncio.sleep(0.01 * ticks)
        if ticks == 1:
            raise ValueError("shard")
        ended.append(ticks)

    async def array(ticks):
        await asyncio.sleep(0.01 * ticks)
        if ticks == 0:
            raise ValueError("array")
        await asyncio.gather(*map(shard, (1, 2, 3)))

    async def read():
        await asyncio.gather(array(0), array(5))

    async def left():
        with pytest.raises(ValueError, match="array"):
            await _when_all_have_ended(read())
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(left()) == set()
    assert ended == [2, 3]


def test_the_error_for_another_models_state(whole):
    checkpoints = open_at(whole)
    wider = r"another model \(moments/shared/mu/block/kernel is float32\[16, 40\], here float32\[16, 41\]\)"
    with pytest.raises(UserError, match=wider):
        checkpoints.restore(7, state_at(0, width=41))
    like = state_at(0)
    with pytest.raises(UserError, match=r"moments/recovery/count is not there, here int32\[\]"):
        checkpoints.restore(7, like.replace(moments={"recovery": like.moments["shared"]}))


def test_a_full_disk(tmp_path, monkeypatch, caplog):
    """One error, and no traceback of the other arrays' writes, which end after it."""
    unseen = []
    monkeypatch.setattr(sys, "unraisablehook", unseen.append)
    save(tmp_path, 1)
    checkpoints = open_at(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(UserError, match=r"checkpoints: a checkpoint cannot be written \(.*free disk space"):
            checkpoints.save(2, state_at(2, width=40_000), {}, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_at(tmp_path).steps() == [1]
    gc.collect()  # a task that has never been awaited says so when it is deleted
    assert unseen == [] and not [record for record in caplog.records if record.name == "asyncio"]


def test_the_folder_is_absolute_or_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(checkpoints_folder("runs/mine")) == str(tmp_path.resolve() / "runs/mine/checkpoints")
    assert str(checkpoints_folder("gs://bucket/runs/mine")) == "gs://bucket/runs/mine/checkpoints"


def test_a_checkpoint_without_states_of_objectives_is_read(tmp_path):
    """As earlier versions wrote it."""
    fields = {field.name: getattr(state_at(3), field.name) for field in dataclasses.fields(TrainState)}
    del fields["objectives"]
    earlier = dataclasses.make_dataclass("Earlier", list(fields))
    jax.tree_util.register_dataclass(earlier, list(fields), [])
    checkpoints = open_at(tmp_path)
    checkpoints.save(3, earlier(**fields), POSITIONS, PROVENANCE)
    checkpoints.wait()
    same_bits(checkpoints.restore(3, state_at(0))[0], state_at(3))
