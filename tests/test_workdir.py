"""A work folder: one launcher at a time, one set of inputs."""

import pytest

from jaxsearch.errors import InputError
from tests.toy_config import ToyConfig
from train.workdir import alone, claim


def test_two_launchers_never_work_in_one_folder(tmp_path):
    with alone(tmp_path):
        pass
    with alone(tmp_path), pytest.raises(InputError, match="another process works in"), alone(tmp_path):
        raise AssertionError


def test_a_folder_that_was_begun_is_refused_to_other_inputs(tmp_path):
    claim(tmp_path, ToyConfig(steps=1), data="a")
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events").touch()
    claim(
        tmp_path, ToyConfig(steps=2), data="b"
    )  # nothing was made yet: a refused run does not hold the folder
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "3" / "state").touch()
    claim(tmp_path, ToyConfig(steps=2), data="b")
    with pytest.raises(InputError, match="was begun with another steps"):
        claim(tmp_path, ToyConfig(steps=3), data="b")
    with pytest.raises(InputError, match="was begun with another data"):
        claim(tmp_path, ToyConfig(steps=2), data="c")
