"""Typed configs: overrides, files, bounds, and what is said of them."""

import dataclasses
from pathlib import Path

import pytest

from jaxsearch.errors import InputError
from tests.toy_config import CONFIG, Inner, ToyConfig
from train.config import check, describe, load_config, override
from train.encoder import EncoderConfig
from train.prune import PruneConfig
from train.ranker import RankerConfig


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "toy.py"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("steps=1_000", {"steps": 1000}),
        ("name=a=b", {"name": "a=b"}),
        ("is_deep=true", {"is_deep": True}),
        ("is_deep=0", {"is_deep": False}),
        ("limit=7", {"limit": 7}),
        ("limit=none", {"limit": None}),
        ("weights=0.5,1", {"weights": (0.5, 1.0)}),
        ("weights=(3,)", {"weights": (3.0,)}),
        ("pair=4,b", {"pair": (4, "b")}),
        ("folder=a/b", {"folder": Path("a/b")}),
        ("inner.rate=1e-3", {"inner": Inner(rate=1e-3)}),
        ("inner.schedule=linear", {"inner": Inner(schedule="linear")}),
    ],
)
def test_an_override_takes_the_type_of_its_field(assignment, expected):
    changed = override(ToyConfig(steps=1), [assignment])
    assert changed == dataclasses.replace(ToyConfig(steps=1), **expected)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("step=3", "ToyConfig has no 'step'; near it: steps"),
        ("inner.rat=3", "Inner has no 'rat'; near it: rate"),
        ("inner=3", "holds several fields: inner.rate"),
        ("steps.deep=3", "holds one value"),
        ("steps=many", "steps=many: not a value of type int"),
        ("steps=1.5", "not a value of type int"),
        ("is_deep=maybe", "not a value of type bool"),
        ("inner.schedule=cubic", "not a value of type"),
        ("pair=4", "not a value of type"),
        ("steps", "write key=value"),
        ("zzz=1", "has no 'zzz'; it has steps, name, is_deep"),
    ],
)
def test_an_override_that_cannot_be_says_why(assignment, message):
    with pytest.raises(InputError, match=message):
        override(ToyConfig(steps=1), [assignment])


@pytest.mark.parametrize(
    ("config", "assignment", "message"),
    [
        (PruneConfig(), "search.chunk=0", r"--set search\.chunk=0: .*chunk 0 must be at least 1"),
        (
            EncoderConfig(),
            "loss.temperature=0",
            r"loss\.temperature=0: temperature must be above 0, not 0\.0",
        ),
        (EncoderConfig(), "loss.temperature=nan", "temperature must be above 0, not nan"),
        (RankerConfig(), "loss.list_temperature=-1", r"list_temperature must be above 0, not -1\.0"),
        (RankerConfig(), "loss.hidden_weight=-1", r"hidden_weight must be at least 0 and finite, not -1\.0"),
    ],
)
def test_what_a_dataclass_of_the_library_refuses_is_said_in_its_words(config, assignment, message):
    with pytest.raises(InputError, match=message):
        override(config, [assignment])


def test_what_is_printed_can_be_set_again():
    config = ToyConfig(steps=5, limit=3, weights=(4.0,), inner=Inner(rate=2.0))
    assignments = [f"{key}={value}" for key, value in describe(config).items()]
    assert override(ToyConfig(steps=1), assignments) == config


def test_config_files_that_are_no_configs_are_refused(config_file, tmp_path):
    with pytest.raises(InputError, match=r"absent\.py: no such file; beside it there are .*toy\.py"):
        load_config(tmp_path / "absent.py", quick=False, config_type=ToyConfig)
    with pytest.raises(InputError, match="is a ToyConfig, this launcher takes Inner"):
        load_config(config_file, quick=False, config_type=Inner)
    config_file.write_text("x = 1\n")
    with pytest.raises(InputError, match=r"defines no quick\(\)"):
        load_config(config_file, quick=True, config_type=ToyConfig)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def quick(:\n", r"toy\.py:1: SyntaxError"),
        (CONFIG.replace("steps=2", "step=2"), r"toy\.py:8: TypeError: .*'step'"),
        ("import nothing_of_that_name\n", r"toy\.py:1: ModuleNotFoundError"),
    ],
)
def test_a_config_file_that_fails_is_told_with_its_line(config_file, text, message):
    config_file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(config_file, quick=True, config_type=ToyConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"steps": "6"}, "steps: '6' is not a value of type int"),
        ({"steps": True}, "steps: True is not a value of type int"),
        ({"inner": Inner(rate=float("nan"))}, "inner.rate must be at least 0 and at most 1, not nan"),
        ({"inner": Inner(rate=1.5)}, "inner.rate must be at least 0 and at most 1, not 1.5"),
        ({"inner": Inner(schedule="cubic")}, "inner.schedule: 'cubic' is not"),
        ({"pair": (1, 2)}, "pair: .1, 2. is not"),
        ({"weights": [1.0]}, "weights: .1.0. is not"),
        ({"limit": 1.5}, "limit: 1.5 is not"),
    ],
)
def test_values_of_another_type_or_out_of_bounds_are_refused(changes, message):
    check(ToyConfig(steps=1, limit=3, weights=(1, 2.5)))
    with pytest.raises(InputError, match=message):
        check(ToyConfig(**{"steps": 1} | changes))


def test_all_wrong_values_are_told_at_once():
    with pytest.raises(InputError, match=r"steps must be .*; inner.rate must be"):
        check(ToyConfig(steps=0, inner=Inner(rate=2.0)))
