"""Compiled programs that travel with a bundle."""

import os
import subprocess
import sys

import pytest

from jaxsearch.bundle import PROGRAMS, load_bundle
from jaxsearch.errors import InputError
from serve.programs import LISTED, load_programs, machine_name
from tests.live_server import running, wait_until_ready
from tests.tiny_bundle import write_tiny_bundle

SMALL = ("--max-queue-tokens", "1000")


def save(bundle, cache):
    environment = {**os.environ, "JAXSEARCH_CACHE": str(cache)}
    command = [sys.executable, "-m", "serve.main", "--bundle", str(bundle), "--save-programs"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """With programs in its folder."""
    written = write_tiny_bundle(tmp_path_factory.mktemp("bundle"))
    revision = load_bundle(written).revision
    done = save(written, tmp_path_factory.mktemp("cache"))
    assert done.returncode == 0, done.stderr
    assert "programs for machines like this one" in done.stdout
    assert load_bundle(written).revision == revision
    return written


def entries(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name.endswith("-cache")}


def test_a_server_with_programs_compiles_nothing(bundle, tmp_path):
    """What it compiled would be new in its cache."""
    log = tmp_path / "log"
    with running(bundle, log, *SMALL) as (_, client):
        wait_until_ready(client)
        assert client.post("/v1/rerank", json={"query": "a", "documents": ["b"]}).status_code == 200
    saved = entries(bundle / PROGRAMS / machine_name())
    assert len(saved) > 5
    assert f"{len(saved)} compiled programs came with the bundle" in log.read_text()
    added = entries(bundle.parent / "cache" / "xla").keys() - saved.keys()
    assert not [
        name for name in added if not name.startswith("jit_top_k-")
    ]  # which bm25s tries when it is imported


def test_damaged_programs_are_said_and_not_used(bundle, tmp_path):
    folder = bundle / PROGRAMS / machine_name()
    victim = next(path for path in folder.iterdir() if path.name != LISTED)
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + b"x")
    try:
        with pytest.raises(InputError, match=r"1 of \d+ compiled programs are damaged"):
            load_programs(bundle, tmp_path / "cache")
        assert not (tmp_path / "cache").exists()
        with running(bundle, tmp_path / "log", *SMALL) as (_, client):
            wait_until_ready(client)
        assert "damaged" in (tmp_path / "log").read_text()
    finally:
        victim.write_bytes(whole)
    assert load_programs(bundle, tmp_path / "cache") == len(entries(tmp_path / "cache"))


def test_a_folder_that_cannot_be_written_is_one_line(bundle, tmp_path):
    (tmp_path / PROGRAMS).write_text("a file where the folder would be")
    done = save(tmp_path, tmp_path / "cache")
    assert done.returncode == 2
    assert "cannot write to" in done.stderr
    assert len(done.stderr.splitlines()) == 1
