"""Command line to typed config: overrides, messages, exit codes, atomic JSON."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Literal

import jax
import pytest
import rich.console

from jaxsearch.errors import InputError
from train.options import alone, describe, load_config, override, progress, run, write_json


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    """How fast."""
    schedule: Literal["cosine", "linear"] = "cosine"


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    steps: int
    """How long, in
    optimiser steps."""
    name: str = "toy"
    is_deep: bool = False
    limit: int | None = None
    weights: tuple[float, ...] = (1.0, 2.0)
    pair: tuple[int, str] = (1, "a")
    folder: Path = Path("here")
    inner: Inner = dataclasses.field(default_factory=Inner)


CONFIG = '''"""Note."""
from test_options import ToyConfig

def config():
    return ToyConfig(steps=100)

def quick():
    return ToyConfig(steps=2)
'''


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "toy.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def unchanged_jax(monkeypatch, tmp_path):
    """Launchers turn the compile cache on for their process; tests share theirs."""
    monkeypatch.setenv("JAXSEARCH_CACHE", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


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
    ],
)
def test_an_override_that_cannot_be_says_why(assignment, message):
    with pytest.raises(InputError, match=message):
        override(ToyConfig(steps=1), [assignment])


def test_what_is_printed_can_be_set_again():
    config = ToyConfig(steps=5, limit=3, weights=(4.0,), inner=Inner(rate=2.0))
    assignments = [f"{key}={value}" for key, value in describe(config).items()]
    assert override(ToyConfig(steps=1), assignments) == config


def test_a_launcher_gets_its_config_and_workdir(config_file, tmp_path, unchanged_jax):
    seen = []
    workdir = tmp_path / "deep" / "run"
    arguments = [
        "--config",
        str(config_file),
        "--quick",
        "--workdir",
        str(workdir),
        "--set",
        "name=x",
        "limit=4",
    ]
    run(lambda config, workdir: seen.append((config, workdir)), ToyConfig, argv=arguments)
    assert seen == [(ToyConfig(steps=2, name="x", limit=4), workdir)]
    assert workdir.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache" / "xla")


def test_print_config_prints_and_stops(config_file, capsys):
    run(
        lambda config, workdir: pytest.fail("ran"),
        ToyConfig,
        argv=["--config", str(config_file), "--print-config"],
    )
    printed = capsys.readouterr().out.splitlines()
    assert "steps=100" in printed
    assert "inner.rate=0.1" in printed


def test_help_documents_the_fields(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(lambda config, workdir: None, ToyConfig, argv=["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "steps: int\n      How long, in optimiser steps." in text
    assert "inner.rate: float = 0.1\n      How fast." in text


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (InputError("no such thing; do that"), 2, "error: no such thing; do that"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_a_code(
    config_file, tmp_path, unchanged_jax, capsys, raised, code, text
):
    def main(config, workdir):
        raise raised

    with pytest.raises(SystemExit) as stopped:
        run(main, ToyConfig, argv=["--config", str(config_file), "--workdir", str(tmp_path / "w")])
    assert stopped.value.code == code
    message = capsys.readouterr().err
    assert message.startswith(text)
    assert message.count("\n") == 1


def test_a_bug_keeps_its_traceback(config_file, tmp_path, unchanged_jax):
    def main(config, workdir):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main, ToyConfig, argv=["--config", str(config_file), "--workdir", str(tmp_path / "w")])


def test_config_files_that_are_no_configs_are_refused(config_file, tmp_path):
    with pytest.raises(InputError, match=r"absent\.py: no such file; beside it there are .*toy\.py"):
        load_config(tmp_path / "absent.py", quick=False, config_type=ToyConfig)
    with pytest.raises(InputError, match="is a ToyConfig, this launcher takes Inner"):
        load_config(config_file, quick=False, config_type=Inner)
    config_file.write_text("x = 1\n")
    with pytest.raises(InputError, match=r"defines no quick\(\)"):
        load_config(config_file, quick=True, config_type=ToyConfig)


def test_a_workdir_that_cannot_be_made_is_said(config_file, tmp_path, unchanged_jax, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(
            lambda *_: None,
            ToyConfig,
            argv=["--config", str(config_file), "--workdir", str(config_file / "below")],
        )
    assert stopped.value.code == 2
    assert "cannot be made" in capsys.readouterr().err


def test_json_is_whole_or_as_before(tmp_path):
    path = tmp_path / "deep" / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["report.json"]


def test_two_launchers_never_work_in_one_folder(tmp_path):
    with alone(tmp_path):
        pass
    with alone(tmp_path), pytest.raises(InputError, match="another process works in"), alone(tmp_path):
        raise AssertionError


def test_progress_without_a_terminal_prints_the_end():
    console = rich.console.Console(file=io.StringIO(), force_terminal=False)
    with progress("labels", 3, done=1, console=console) as advance:
        advance(text="slow")
        advance(text="done")
    assert console.file.getvalue() == "labels 3/3 done\n"
    with progress("labels", 3, console=console, silent_seconds=0) as advance:
        advance(2)
    assert console.file.getvalue().endswith("labels 2/3\n")


def test_progress_on_a_terminal_draws_a_bar():
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress("labels", 2, console=console) as advance:
        advance(2, text="12 tokens/s")
    assert "2/2" in console.file.getvalue()
    assert "12 tokens/s" in console.file.getvalue()
