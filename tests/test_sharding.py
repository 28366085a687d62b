"""The mesh, the rules, and that eight devices train what one device trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from jaxsearch.errors import InputError
from jaxsearch.nn.bert import Bert, BertConfig
from jaxsearch.sharding import (
    MESH_AXES,
    RULES,
    batch_sharding,
    flatten_state,
    make_mesh,
    param_axes,
    param_shardings,
    shard_model,
    unflatten_state,
)
from tests.eight_devices import take_steps, tiny_decoder
from train.step import MeshConfig

MESHES = ((2, 2, 2), (1, 4, 2))
CASES = [pytest.param(mesh, id="x".join(map(str, mesh))) for mesh in MESHES]


class OneParam(nnx.Module):
    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...] | None):
        self.kernel = nnx.Param(jnp.zeros(shape)) if axes is None else nnx.Param(jnp.zeros(shape), axes=axes)


def mesh_2x2x2() -> AbstractMesh:
    return AbstractMesh((2, 2, 2), MESH_AXES)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> dict[tuple[int, ...], tuple[dict, dict]]:
    """{mesh: (arrays, layout)} from processes with eight simulated devices."""
    results = {}
    root = Path(__file__).parent
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(root.parent)}
    for mesh in MESHES:
        folder = tmp_path_factory.mktemp("mesh")
        command = [sys.executable, str(root / "eight_devices.py"), *map(str, mesh), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with np.load(folder / "result.npz") as arrays:
            results[mesh] = (dict(arrays), json.loads((folder / "shardings.json").read_text()))
    return results


@pytest.fixture(scope="module")
def one_device():
    return take_steps(tiny_decoder(), MeshConfig())


@pytest.mark.parametrize("mesh", CASES)
def test_eight_devices_train_what_one_device_trains(sharded, one_device, mesh):
    arrays, _ = sharded[mesh]
    _, state, losses = one_device
    np.testing.assert_allclose(arrays["losses"], losses, rtol=1e-5)  # measured: 2.3e-7
    moments = state["optimizer"][0]
    for kind, leaves in (("mu", moments.mu), ("nu", moments.nu)):
        for name, leaf in leaves.items():
            error = np.abs(arrays[f"{kind}/{name}"] - leaf).max() / np.abs(leaf).max()
            assert error <= 3e-5, (
                kind,
                name,
            )  # measured: 2.6e-6 on 2x2x2 (1.2e-5 on a busy machine), 6.2e-6 on 1x4x2
    for name, leaf in state["params"].items():
        # In the 2-norm: Adam divides by the root of nu, which lifts the rounding of single gradients near 0.
        error = np.linalg.norm(arrays[f"params/{name}"] - leaf) / np.linalg.norm(leaf)
        assert error <= 1e-5, name  # measured: 6.9e-7 on 2x2x2, 2.4e-6 on 1x4x2


@pytest.mark.parametrize("mesh", CASES)
def test_every_parameter_and_moment_lies_as_its_axes_say(sharded, mesh):
    _, layout = sharded[mesh]
    sizes = dict(zip(MESH_AXES, mesh, strict=True))
    axes = param_axes(tiny_decoder())
    for name, logical in axes.items():
        wanted = [RULES[axis] for axis in logical]
        for kind in ("params", "mu", "nu"):
            found = layout[f"{kind}/{name}"]
            spec = found["spec"] + [None] * (len(wanted) - len(found["spec"]))
            assert spec == wanted, (kind, name)
            cut = [size // sizes.get(axis, 1) for size, axis in zip(found["shape"], wanted, strict=True)]
            assert found["shard_shape"] == cut, (kind, name)
            assert found["num_devices"] == 8, (kind, name)
    for name, logical in axes.items():
        if len(set(logical) - {"layers"}) == 2:
            found = layout[f"params/{name}"]
            pieces = np.prod(found["shape"]) // np.prod(found["shard_shape"])
            assert pieces == sizes["fsdp"] * sizes["tensor"], f"{name} is not cut along both of its axes"


def test_lora_and_frozen_weights_share_the_mesh(sharded):
    arrays, layout = sharded[2, 2, 2]
    adapters = {name: found for name, found in layout.items() if "lora_" in name}
    assert len(adapters) == 8
    assert any(found["shape"] != found["shard_shape"] for found in adapters.values())
    assert all(found["num_devices"] == 8 for found in layout.values())
    assert np.isfinite(arrays["lora_losses"]).all()
    assert arrays["lora_losses"][0] == pytest.approx(arrays["losses"][0], rel=1e-6)  # measured 0


def test_a_mesh_takes_what_is_left_and_says_what_does_not_fit():
    assert dict(make_mesh().shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    with pytest.raises(InputError, match=r"data=2, fsdp=1, tensor=1 does not fit 1 device"):
        make_mesh(data=2)
    with pytest.raises(InputError, match="at most one of them -1"):
        make_mesh(data=-1, fsdp=-1)
    with pytest.raises(InputError, match="does not fit"):
        make_mesh(data=-1, tensor=3)


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((4, 4), ("embed", "embed"), "both want the mesh axis 'fsdp'"),
        ((4, 4), ("mlp", "heads"), "'mlp' and 'heads' both want the mesh axis 'tensor'"),
        ((4, 4), ("embed",), "1 axis names for 2 dimensions"),
        ((4, 4), ("embed", "colour"), "unknown axis 'colour'"),
        ((5, 4), ("vocab", "embed"), "'vocab' of 5 is not divisible by tensor=2"),
        ((4, 4), None, "states no axes"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_by_name(shape, axes, message):
    with pytest.raises(InputError, match=f"kernel.*{message}"):
        param_shardings(OneParam(shape, axes), mesh_2x2x2())


def test_all_impossible_layouts_are_reported_at_once():
    model = nnx.List([OneParam((4, 4), ("mlp", "heads")), OneParam((3,), ("embed",))])
    with pytest.raises(InputError) as caught:
        param_shardings(model, mesh_2x2x2())
    assert "0.kernel" in str(caught.value)
    assert "1.kernel" in str(caught.value)


def test_every_parameter_of_both_networks_names_known_axes():
    bert = Bert(
        BertConfig(vocab_size=32, embed_dim=16, mlp_dim=32, num_layers=2, num_heads=2, max_positions=16),
        rngs=nnx.Rngs(0),
    )
    for model in (bert, tiny_decoder()):
        shardings = param_shardings(model, mesh_2x2x2())
        assert shardings.keys() == flatten_state(nnx.state(model)).keys()
        assert None not in param_axes(model).values()


def test_batches_are_cut_over_data_and_fsdp():
    mesh = mesh_2x2x2()
    assert batch_sharding(mesh).shard_shape((8, 3)) == (2, 3)
    assert batch_sharding(mesh, microbatched=True).spec == PartitionSpec(None, ("data", "fsdp"))


def test_flattening_a_state_and_back_changes_nothing():
    state = nnx.state(tiny_decoder())
    arrays = flatten_state(state)
    assert "layers.self_attn.q_proj.kernel" in arrays
    again = flatten_state(unflatten_state(state, arrays))
    assert all(again[name] is leaf for name, leaf in arrays.items())


def test_a_model_is_laid_out_in_place():
    model = tiny_decoder()
    before = {name: np.asarray(leaf) for name, leaf in flatten_state(nnx.state(model)).items()}
    mesh = make_mesh()
    shard_model(model, mesh)
    for name, leaf in flatten_state(nnx.state(model)).items():
        assert leaf.sharding.mesh == mesh
        np.testing.assert_array_equal(leaf, before[name])
