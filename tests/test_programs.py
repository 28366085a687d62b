"""Compiled programs that travel with a bundle."""

import os
import shutil
import subprocess
import sys

import pytest

from jaxsearch.bundle import PROGRAMS, load_bundle
from jaxsearch.errors import InputError
from jaxsearch.files import sha256_hex, write_json
from serve.programs import LISTED, load_programs, machine_name, saved_programs
from tests.live_server import running, said_when_ready, wait_until_ready
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
    assert "on machines like this one" in done.stdout
    assert load_bundle(written).revision == revision
    return written


def entries(folder):
    return {path.name for path in folder.iterdir() if path.name.endswith("-cache")}


def test_a_server_with_programs_compiles_nothing(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DEBUG_LOG_MODULES", "jax._src.compiler")
    log = tmp_path / "log"
    with running(bundle, log, *SMALL, "--use-programs") as (_, client):
        wait_until_ready(client)
        assert client.post("/v1/rerank", json={"query": "a", "documents": ["b"]}).status_code == 200
        said = said_when_ready(log)
    saved = entries(bundle / PROGRAMS / machine_name())
    assert f"{len(saved)} files of compiled programs for machines like this one are in" in said
    assert " programs, 0 of them compiled now: http" in said
    missed = [line for line in said.splitlines() if "COMPILATION CACHE MISS" in line]
    assert not [line for line in missed if "jit_top_k" not in line]  # which bm25s tries when it is imported
    assert said.lower().count("compilation cache hit") > 5


def test_programs_of_other_options_are_said_and_the_rest_compiled(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")  # with a cache of its own
    with running(copy, tmp_path / "log", *SMALL, "--use-programs", "--batch-invariant") as (_, client):
        wait_until_ready(client)
        said = said_when_ready(tmp_path / "log")
    assert " programs, 1 of them compiled now: http" in said
    assert "is of other options or another version: 1 compiled; save them too with --save-programs" in said


def test_damaged_programs_are_said_and_not_used(bundle, tmp_path):
    folder = bundle / PROGRAMS / machine_name()
    victim = next(path for path in folder.iterdir() if path.name != LISTED)
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(InputError, match=r"1 of \d+ compiled programs are damaged"):
            load_programs(bundle, tmp_path / "cache")
        assert not (tmp_path / "cache").exists()
        with running(bundle, tmp_path / "log", *SMALL, "--use-programs") as (_, client):
            wait_until_ready(client)
        assert "warning: " in (tmp_path / "log").read_text()
        assert "damaged" in (tmp_path / "log").read_text()
    finally:
        victim.write_bytes(whole)
    assert load_programs(bundle, tmp_path / "cache") == len(entries(tmp_path / "cache"))


def test_names_outside_the_folder_are_not_followed(bundle, tmp_path):
    folder = bundle / PROGRAMS / machine_name()
    listed = (folder / LISTED).read_text()
    (bundle / "evil-cache").write_bytes(b"evil")
    write_json(folder / LISTED, {"../../evil-cache": sha256_hex(bundle / "evil-cache")})
    try:
        with pytest.raises(InputError, match="1 of 1 compiled programs are damaged"):
            load_programs(bundle, tmp_path / "cache")
    finally:
        (folder / LISTED).write_text(listed)
        (bundle / "evil-cache").unlink()


def test_where_nothing_fits_or_can_be_copied_it_is_said(bundle, tmp_path):
    with pytest.raises(InputError, match="has no programs for machines like this one"):
        load_programs(tmp_path, tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot copy programs"):
        load_programs(bundle, tmp_path / "file")


def test_programs_of_other_options_stay_and_nothing_is_left_of_a_failure(tmp_path):
    folder = tmp_path / PROGRAMS / machine_name()
    for name in ("a-cache", "b-cache"):
        with saved_programs(tmp_path) as part:
            (part / name).write_text(name)
    assert entries(folder) == {"a-cache", "b-cache"}
    assert load_programs(tmp_path, tmp_path / "cache") == 2
    with pytest.raises(InputError, match="nothing to its compilation cache"), saved_programs(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), saved_programs(tmp_path):
        (tmp_path / "other").read_text()
    assert list((tmp_path / PROGRAMS).iterdir()) == [folder]


def test_a_folder_that_is_no_bundle_or_cannot_be_written_is_one_line(bundle, tmp_path):
    done = save(tmp_path / "typo", tmp_path / "cache")
    assert done.returncode == 2
    assert "holds no bundle" in done.stderr
    assert not (tmp_path / "typo").exists()
    copy = shutil.copytree(bundle, tmp_path / "copy", ignore=shutil.ignore_patterns(PROGRAMS))
    (copy / PROGRAMS).write_text("a file where the folder would be")
    done = save(copy, tmp_path / "cache")
    assert done.returncode == 2
    assert "cannot write to" in done.stderr
    assert len(done.stderr.splitlines()) == 1
