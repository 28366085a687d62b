"""From the command line to a launcher: arguments, messages, exit codes, progress."""

import io
from pathlib import Path

import jax
import pytest
import rich.console

from jaxsearch.errors import InputError
from tests.toy_config import CONFIG, ToyConfig
from train.options import progress, run


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


def test_a_workdir_that_cannot_be_made_is_said(config_file, tmp_path, unchanged_jax, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(
            lambda *_: None,
            ToyConfig,
            argv=["--config", str(config_file), "--workdir", str(config_file / "below")],
        )
    assert stopped.value.code == 2
    assert "cannot be made" in capsys.readouterr().err


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


def test_a_flag_for_a_field_that_the_config_lacks_is_not_offered(config_file, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(lambda *_: None, ToyConfig, argv=["--config", str(config_file), "--skip-bad-lines"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --skip-bad-lines" in capsys.readouterr().err


def test_values_are_checked_before_the_launcher_runs(config_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(
            lambda *_: pytest.fail("ran"),
            ToyConfig,
            argv=["--config", str(config_file), "--workdir", str(tmp_path / "w"), "--set", "steps=0"],
        )
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: steps must be at least 1, not 0\n"
    assert not (tmp_path / "w").exists()
