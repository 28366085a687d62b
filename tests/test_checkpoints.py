"""Training states that survive damage, and model folders that refuse it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxsearch.checkpoints import CARD, TrainCheckpoints, load_model, model_version, save_model
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.errors import InputError
from tests.small_models import BERT, LLAMA, assert_same_bits, make

CARD_OF_A_RANKER = {"kind": "ranker", "view": "short", "labels": ["yes", "no"]}


def state_of(step: int, width: int = 64) -> dict:
    """Arrays of every kind that a training state holds."""
    values = np.random.default_rng(step).normal(size=(width, width)).astype(np.float32)
    return {
        "params": {"layers.kernel": jnp.asarray(values), "half": jnp.asarray(values[0], jnp.bfloat16)},
        "optimizer": ({"mu": jnp.asarray(-values)}, jnp.asarray(step, jnp.int32)),
        "is_sound": jnp.asarray(True),
    }


def assert_same(found: dict, wanted: dict) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def filled(directory: Path, steps: range, **options) -> None:
    with TrainCheckpoints(directory, **options) as store:
        for step in steps:
            store.save(step, state_of(step), metrics={"ndcg@10": 1.0 / step})


def steps_in(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def largest_file(directory: Path) -> Path:
    return max(
        (path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def test_the_newest_state_comes_back_bit_for_bit(tmp_path):
    filled(tmp_path, range(1, 4))
    with TrainCheckpoints(tmp_path) as store:
        restored = store.restore(state_of(0))
    assert restored is not None
    assert restored.step == 3
    assert restored.metrics == {"ndcg@10": pytest.approx(1 / 3)}
    assert_same(restored.arrays, state_of(3))


def test_an_empty_directory_has_nothing_to_restore(tmp_path):
    with TrainCheckpoints(tmp_path / "deep" / "new", best_metric="ndcg@10") as store:
        assert store.restore(state_of(0)) is None
        assert store.latest_step() is None
        assert store.best_step() is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    filled(tmp_path, range(1, 6), keep=2, best_metric="ndcg@10")
    assert steps_in(tmp_path) == ["1", "4", "5"]
    with TrainCheckpoints(tmp_path, keep=2, best_metric="ndcg@10") as store:
        assert store.best_step() == 1
        best = store.restore(state_of(0), step=1)
        assert best is not None
        assert_same(best.arrays, state_of(1))


def test_states_without_the_metric_are_never_the_best(tmp_path):
    with TrainCheckpoints(tmp_path, keep=3, best_metric="kappa") as store:
        store.save(1, state_of(1), metrics={"kappa": -0.5})
        store.save(2, state_of(2))
        store.save(3, state_of(3), metrics={"kappa": float("nan")})
        assert store.best_step() == 1


def test_a_saved_state_does_not_follow_what_becomes_of_the_arrays(tmp_path):
    state = state_of(1, width=512)
    wanted = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda state: jax.tree.map(jnp.zeros_like, state), donate_argnums=0)
    with TrainCheckpoints(tmp_path) as store:
        store.save(1, state)
        overwrite(state)
        restored = store.restore(state_of(0, width=512))
    assert restored is not None
    assert_same(restored.arrays, wanted)


def damage_bits(step: Path) -> None:
    file = largest_file(step)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 0xFF for byte in content[middle : middle + 8])
    file.write_bytes(content)


def damage_length(step: Path) -> None:
    file = largest_file(step)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_absence(step: Path) -> None:
    largest_file(step).unlink()


def damage_notes(step: Path) -> None:
    for path in (step / "notes").iterdir():
        path.write_bytes(b"{")


@pytest.mark.parametrize("damage", [damage_bits, damage_length, damage_absence, damage_notes])
def test_a_damaged_state_is_set_aside_and_the_one_before_it_used(tmp_path, damage):
    filled(tmp_path, range(1, 4))
    damage(tmp_path / "3")
    said = []
    with TrainCheckpoints(tmp_path, say=said.append) as store:
        restored = store.restore(state_of(0))
        assert restored is not None
        assert restored.step == 2
        assert_same(restored.arrays, state_of(2))
        store.save(3, state_of(3))
        again = store.restore(state_of(0))
    assert again is not None
    assert again.step == 3
    assert len(said) == 1
    assert "3.corrupt" in said[0]
    assert (tmp_path / "3.corrupt").is_dir()


def test_a_changed_value_that_storage_takes_for_good_is_found(tmp_path):
    filled(tmp_path, range(1, 3))
    notes = next((tmp_path / "2" / "notes").glob("*"))
    content = json.loads(notes.read_text())
    content["sums"]["optimizer/0/mu"] ^= 1
    notes.write_text(json.dumps(content))
    said = []
    with TrainCheckpoints(tmp_path, say=said.append) as store:
        restored = store.restore(state_of(0))
    assert restored is not None
    assert restored.step == 1
    assert "optimizer/0/mu is not what was saved" in said[0]


def test_the_state_of_another_model_is_refused_and_left_alone(tmp_path):
    filled(tmp_path, range(1, 2))
    with TrainCheckpoints(tmp_path) as store:
        with pytest.raises(InputError, match=r"another model or optimiser: 3 arrays.*--workdir"):
            store.restore(state_of(0, width=32))
        assert store.latest_step() == 1


FULL_DISK = """
import resource, sys, time
from test_checkpoints import state_of
from jaxsearch.checkpoints import TrainCheckpoints

said = []
with TrainCheckpoints(sys.argv[1], say=said.append) as store:
    store.save(1, state_of(1, 512))
    store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    store.save(2, state_of(2, 512))
    store.wait()
    assert store.restore(state_of(0, 512)).step == 1
    store.save(3, state_of(3, 512))
    time.sleep(1)  # the writer fails behind our back
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.save(4, state_of(4, 512))
    assert store.restore(state_of(0, 512)).step == 4
assert len(said) == 2 and all("could not be written" in line for line in said), said
"""


def test_a_disk_that_is_full_for_a_while_costs_the_checkpoints_of_that_while(tmp_path):
    root = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{root.parent}{os.pathsep}{root}"}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "states")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert steps_in(tmp_path / "states") == ["1", "4"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {"[UNK]": 0, "yes": 1, "no": 2, "harbour": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_path(folder)


@pytest.mark.parametrize("config", [LLAMA, BERT], ids=["decoder", "bert"])
def test_a_model_folder_comes_back_whole(tmp_path, tokenizer, config):
    model = make(config)
    save_model(tmp_path / "deep" / "model", model, tokenizer, CARD_OF_A_RANKER)
    loaded = load_model(tmp_path / "deep" / "model")
    assert_same_bits(model, loaded.model)
    assert loaded.model.config == config
    version = loaded.card.pop("version")
    assert loaded.card == CARD_OF_A_RANKER
    assert version == model_version(tmp_path / "deep" / "model")
    assert len(version) == 12
    assert loaded.tokenizer.encode_batch(["yes harbour"]) == [[1, 3]]
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["model"]


def test_the_version_follows_the_content_only(tmp_path, tokenizer):
    model = make(LLAMA)
    versions = {}
    for name, card, seed in (("a", {"x": 1}, 0), ("b", {"x": 1}, 0), ("c", {"x": 2}, 0), ("d", {"x": 1}, 1)):
        save_model(tmp_path / name, make(LLAMA, seed=seed), tokenizer, card)
        versions[name] = model_version(tmp_path / name)
    assert versions["a"] == versions["b"]
    assert len(set(versions.values())) == 3
    save_model(tmp_path / "c", model, tokenizer, {"x": 1})
    assert model_version(tmp_path / "c") == versions["a"]
    assert load_model(tmp_path / "c").card["x"] == 1


def test_a_folder_without_a_card_loads_as_its_makers_published_it(tmp_path, tokenizer):
    save_model(tmp_path / "model", make(LLAMA), tokenizer, {})
    (tmp_path / "model" / CARD).unlink()
    loaded = load_model(tmp_path / "model", dtype=jnp.bfloat16)
    assert loaded.card == {}
    assert loaded.model(jnp.ones((1, 4), jnp.int32)).dtype == jnp.bfloat16


def test_a_folder_whose_files_do_not_belong_together_is_refused(tmp_path, tokenizer):
    save_model(tmp_path / "model", make(LLAMA), tokenizer, CARD_OF_A_RANKER)
    save_model(tmp_path / "other", make(LLAMA, seed=1), tokenizer, CARD_OF_A_RANKER)
    weights = (tmp_path / "other" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match=f"not those that {CARD} was written for"):
        load_model(tmp_path / "model")
    (tmp_path / "other" / CARD).write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_model(tmp_path / "other")
    with pytest.raises(InputError, match="no such model folder"):
        load_model(tmp_path / "absent")


def test_a_folder_that_cannot_be_written_is_said_and_the_old_one_stays(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the model folder"):
        save_model(tmp_path / "file" / "model", make(LLAMA), tokenizer, {})
    save_model(tmp_path / "model", make(LLAMA), tokenizer, {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_model(tmp_path / "model", make(LLAMA), tokenizer, {"x": float("nan")})
    assert load_model(tmp_path / "model").card["x"] == 1
    assert steps_in(tmp_path) == ["file", "model"]


def test_a_restored_state_lies_where_the_template_lies(tmp_path):
    filled(tmp_path, range(1, 2))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with TrainCheckpoints(tmp_path) as store:
        restored = store.restore(jax.device_put(state_of(0), sharding))
    assert restored is not None
    assert {leaf.sharding for leaf in jax.tree.leaves(restored.arrays)} == {sharding}
    assert dataclasses.is_dataclass(restored)
