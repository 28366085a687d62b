"""Configs are lab notes that hold, and every command that we tell people to type exists."""

import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from train.config import check, describe, load_config, override

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.py") if path.name != "__init__.py")
SOURCES = sorted(
    path for folder in ("jaxsearch", "train", "serve", "configs") for path in (ROOT / folder).rglob("*.py")
)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
CODE = re.compile(r"```.*?```|`[^`\n]+`|^ {4,}.*$", re.DOTALL | re.MULTILINE)
NOTE_PARTS = ("Command:", "Time:", "Numbers:")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def docstring_of(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def note_command(path: Path) -> list[str]:
    """The words of the lab note's command; its further lines are indented."""
    lines = docstring_of(path).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("Command:"))
    last = next(number for number, line in enumerate(lines) if number > first and not line.startswith(" "))
    return shlex.split("\n".join(lines[first:last]).removeprefix("Command:").replace("\\\n", " "))


def launcher_of(path: Path) -> str:
    words = note_command(path)
    assert words[:2] == ["python", "-m"], words
    return words[2]


def config_type(path: Path) -> type:
    """The type that the file's `config()` states to return, which its launcher defines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    made = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "config")
    assert isinstance(made.returns, ast.Name), f"{path} states no type"
    return getattr(importlib.import_module(launcher_of(path)), made.returns.id)


def both(path: Path) -> list[Any]:
    return [load_config(path, quick=quick, config_type=config_type(path)) for quick in (False, True)]


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_a_config_is_a_lab_note(path):
    note = docstring_of(path)
    missing = [part for part in NOTE_PARTS if not re.search(f"^{part} .", note, re.MULTILINE)]
    assert not missing
    assert not re.search(r"^(Time|Numbers): [A-Z]+$", note, re.MULTILINE), "a placeholder"
    words = note_command(path)
    assert words[words.index("--config") + 1] == relative(path)
    assert not re.search(r"[^\\]\n +(--[a-z]|[a-z_.]+=)", note), "a line of the command lacks its backslash"
    if "--set" in words:
        given = words[words.index("--set") + 1 :]
        override(both(path)[0], [word for word in given if not word.startswith("--")])


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_both_variants_are_made_and_printed_so_that_they_can_be_set_again(path):
    for config in both(path):
        values = describe(config)
        assert values
        check(config)
        plain = {key: value for key, value in values.items() if not _holds_dataclasses(config, key)}
        assert override(config, [f"{key}={value}" for key, value in plain.items()]) == config


def _holds_dataclasses(config: Any, key: str) -> bool:
    for name in key.split("."):
        config = getattr(config, name)
    return isinstance(config, tuple) and any(map(dataclasses.is_dataclass, config))


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_no_field_is_one_that_nothing_reads(path):
    read = {
        node.attr
        for source in SOURCES
        if source.parts[len(ROOT.parts)] in ("train", "jaxsearch")
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    # `MeshConfig` is handed on whole, by its fields' names.
    names = {name for key in describe(both(path)[0]) for name in key.split(".")}
    assert names - read - {"data", "fsdp", "tensor"} == set()


def commands_in(text: str) -> list[list[str]]:
    """Word lists of our `python -m` commands in a text, continued over indented lines and backslashes."""
    joined = re.sub(r"\s*\\\n\s+|\s*\n\s+(?=--[a-z])", " ", text)
    return [
        shlex.split(match, comments=True)
        for match in re.findall(r"(?:python3?|\$\(RUN\)) -m ((?:train|serve|jaxsearch)\.[^`|&;\n]*)", joined)
    ]


def code_of(path: Path) -> str:
    """What a file tells people to type: code in Markdown, docstrings in Python, all of a Makefile."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return "\n".join(match.strip("`").rstrip() for match in CODE.findall(text))
    if path.suffix != ".py":
        return text
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return "\n".join(found)


@pytest.mark.parametrize("path", [*PAGES, *SOURCES, ROOT / "Makefile", ROOT / ".ci" / "run"], ids=relative)
def test_every_command_exists(path):
    for words in commands_in(code_of(path)):
        if "<" in words[0]:
            continue
        module = ROOT / Path(*words[0].rstrip(".,:)").split(".")).with_suffix(".py")
        assert module.is_file(), words
        source = module.read_text(encoding="utf-8")
        assert '__name__ == "__main__"' in source, f"{words[0]} is no command"
        if "from train.options import" in source:
            source += (ROOT / "train" / "options.py").read_text(encoding="utf-8")
        for number, word in enumerate(words):
            if word.startswith("--"):
                flag = word.split("=")[0].rstrip(".,:)")
                assert f'"{flag}"' in source, f"{words[0]} has no {flag}"
            if word == "--config" and not set(words[number + 1]) & set("<…$"):
                config = ROOT / words[number + 1].rstrip(".,:)")
                assert config.is_file(), words
                assigned = [word for word in words[number + 2 :] if "=" in word and not word.startswith("-")]
                override(both(config)[0], [word for word in assigned if not set(word) & set("<…$")])
    code = code_of(path)
    targets = re.findall(r"(?:^|`|\n)\s*make ([a-z]+)\b", code if path.suffix != ".py" else "")
    assert set(targets) <= TARGETS


def test_commands_are_found():
    found = commands_in(
        "run `python -m train.judge --config a.py`\n  python -m serve.main --bundle x \\\n    --port 1\n"
    )
    assert found == [["train.judge", "--config", "a.py"], ["serve.main", "--bundle", "x", "--port", "1"]]


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []
