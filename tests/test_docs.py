"""Every command of the documentation, run as it is written, with its quick variant and tiny models for real ones."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.tiny_bundle import write_parts, write_tiny_bundle
from tests.tiny_collection import write_collection

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^( *)```\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
TINY = {
    "train.judge": ["base={ranker}", "lora_rank=2", "max_shared_tokens=64", "max_item_tokens=96"],
    "train.ranker": [
        "base={ranker}",
        "layers=0",
        "max_shared_tokens=80",
        "max_item_tokens=64",
        "candidates_per_query=4",
    ],
    "train.encoder": ["backbone={encoder}", "max_query_tokens=24", "max_document_tokens=32"],
    "train.prune": ["drop_layers=0", "num_kv_heads=0", "mlp_dim=20", "calibration_queries=4", "per_query=4"],
    "train.evaluate": ["num_samples=20"],
    "train.export": [],
    "train.label": ["num_queries=4", "per_query=4"],
    "train.index": [],
}
"""What stands in for the real models, and for batches that twelve documents are too few for."""
ELSEWHERE = {
    "train.fetch": "tests/test_assets.py",
    "train.gpu_suite": "tests/test_gpu_suite.py",
    "serve.loadtest": "tests/test_loadtest.py",
}
"""Commands that need no collection and have their own tests."""


def commands(page: str) -> list[list[str]]:
    """Word lists of a page's `python -m` commands in order, shell variables filled in."""
    variables: dict[str, str] = {}
    found = []
    for _, block in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = shlex.split(line, comments=True)
            if words and re.fullmatch(r"[A-Z]+=.*", words[0]):
                name, value = words[0].split("=", 1)
                variables[name] = value
            elif words[:2] == ["python", "-m"]:
                filled = [
                    variables[word[1:]].split() if word.startswith("$") else [word] for word in words[2:]
                ]
                found.append([word for words in filled for word in words])
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder as the pages take for granted: our configs, a collection and a vertical in `my`, nothing made yet."""
    parts = write_parts(tmp_path / "parts")
    write_collection(tmp_path / "my" / "data")
    shutil.copytree(parts["vertical"], tmp_path / "my" / "vertical")
    (tmp_path / "my" / "pairs.jsonl").write_text(
        json.dumps({"query_id": "law-q0", "document_id": "wine1", "action": "click", "position": 3}) + "\n"
    )
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "work" / "demo").mkdir(parents=True)
    (tmp_path / "work" / "demo-quick").symlink_to(
        "demo"
    )  # where the quick variants look for each other's models
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_compilation_cache_dir
    yield parts
    jax.config.update("jax_compilation_cache_dir", before)


def launch(words: list[str], parts: dict[str, Path], monkeypatch) -> None:
    module, arguments = words[0], words[1:]
    is_given = any(word.startswith("base=") for word in arguments)
    tiny = [
        value.format(**parts)
        for value in TINY[module]
        if not (is_given and value.startswith(("base=", "layers=")))
    ]
    own = ["collection=my/data", "vertical=my/vertical"]
    here = [*own, *tiny] if module != "train.export" else [*own, "name=tiny"]
    monkeypatch.setattr(sys, "argv", [module, *arguments, "--quick", "--set", *here])
    runpy.run_path(str(ROOT / Path(*module.split(".")).with_suffix(".py")), run_name="__main__")


def serve(words: list[str]) -> None:
    """Until it is ready; then it is told to stop."""
    command = [sys.executable, "-u", "-m", *words, "--port", "0"]
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        lines = []
        for line in server.stdout:
            lines.append(line)
            if line.startswith("ready after"):
                server.send_signal(signal.SIGTERM)
        assert any(line.startswith("ready after") for line in lines), lines
    assert server.returncode == 0


@pytest.mark.parametrize("page", ["docs/own-data.md", "docs/launchers.md"])
def test_every_command_of_a_page_runs_in_its_order(page, place, monkeypatch):
    words_of = [words for words in commands(page) if words[0] not in ELSEWHERE]
    assert len(words_of) >= 8
    for words in words_of:
        if words[0] == "serve.main":
            serve(words)
        else:
            launch(words, place, monkeypatch)


def test_the_library_block_of_the_serving_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    bundle = write_tiny_bundle(tmp_path)
    (tmp_path / "work" / "demo").mkdir(parents=True)
    (tmp_path / "work" / "demo" / "export").symlink_to(bundle.parent)
    monkeypatch.chdir(tmp_path)
    [block] = PYTHON_BLOCK.findall((ROOT / "docs" / "serving.md").read_text(encoding="utf-8"))
    exec(compile(block, "docs/serving.md", "exec"), {})
    assert [line[:2] for line in capsys.readouterr().out.split("\n")] == ["1 ", "2 ", "3 ", ""]


def test_the_readme_has_the_commands_of_the_launchers_page():
    def up_to_the_workdir(page: str) -> list[list[str]]:
        ours = [words for words in commands(page) if words[0] not in ELSEWHERE]
        return [words[: words.index("--set")] if "--set" in words else words for words in ours]

    listed = up_to_the_workdir("README.md")
    assert len(listed) >= 8
    assert [words for words in up_to_the_workdir("docs/launchers.md") if words in listed] == listed


def test_the_other_pages_have_no_command_that_is_not_run_here():
    run = {words[0] for page in ("docs/own-data.md", "docs/launchers.md") for words in commands(page)}
    for path in (ROOT / "docs").glob("*.md"):
        assert {words[0] for words in commands(f"docs/{path.name}")} <= run | ELSEWHERE.keys(), path
