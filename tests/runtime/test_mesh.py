import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from camopd_jax.config.schema import MeshConfig
from camopd_jax.errors import UserError
from camopd_jax.runtime.mesh import (
    check_rows,
    constrain,
    global_rows,
    local_rows,
    make_mesh,
    mesh_of,
    rows_of_process,
    spec,
)


def test_minus_one_means_all_remaining_devices():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(1, -1, 1).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(1, -1, 1, expert=4).shape) == {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}
    assert mesh_of(MeshConfig(1, -1, 1)) == make_mesh(1, -1, 1)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 16, 1), (-1, -1, 1), (0, 1, 1), (-1, 3, 1)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(*sizes)


def test_one_table_from_logical_to_mesh_axes():
    assert spec("batch", "sequence", None) == PartitionSpec(("data", "fsdp"), None, None)
    assert spec("layers", "embed", "heads", "head_dim") == PartitionSpec(None, "fsdp", "tensor", None)
    with pytest.raises(KeyError):
        spec("height")
    with pytest.raises(ValueError, match="collide"):
        spec("heads", "mlp")
    with pytest.raises(ValueError, match="collide"):
        spec("batch", "embed")


def test_global_and_local_rows_are_inverse():
    mesh = make_mesh(2, 2, 2)
    rows = np.arange(24).reshape(8, 3)
    assert rows_of_process(mesh, 8).tolist() == list(range(8))
    spread = global_rows(mesh, {"a": rows}, 8)["a"]
    assert spread.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(local_rows(spread), rows)


def test_the_error_for_indivisible_rows_names_the_field():
    check_rows(make_mesh(2, 2, 2), "config.rollout.batch_size", 12)
    with pytest.raises(UserError, match=r"config\.rollout\.batch_size is 6.*data x fsdp = 4"):
        check_rows(make_mesh(2, 2, 2), "config.rollout.batch_size", 6)


def test_constrain_places_an_intermediate():
    mesh = make_mesh(4, 1, 2)
    out = jax.jit(lambda x: constrain(x * 2, mesh, "batch", "mlp"))(np.ones((8, 6)))
    assert out.addressable_shards[0].data.shape == (2, 3)
