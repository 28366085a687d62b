"""Recorded lengths → sizes of launches → a server in those sizes."""

import itertools
import json
import re
import subprocess
import sys

import pytest

from jaxsearch.buckets import Buckets, Lattice
from jaxsearch.bundle import read_lattice
from jaxsearch.errors import InputError
from jaxsearch.scoring.packing import ScoreRequest
from serve.plan import LengthLog, Lengths, fit, launch_fills, load_lattice, padding, read_lengths
from tests.live_server import running, wait_until_ready
from tests.tiny_bundle import write_tiny_bundle

LATTICE = Lattice.for_prompts(max_prefix_tokens=64, max_item_tokens=256, max_batch_tokens=1024)


def test_lengths_survive_the_file(tmp_path):
    log = LengthLog(tmp_path / "lengths.jsonl")
    log.add(ScoreRequest((1, 2), [[3], [4, 5, 6]]))
    log.add(ScoreRequest((1,), [[3]]))
    log.close()
    assert read_lengths(tmp_path / "lengths.jsonl") == [Lengths(2, (1, 3)), Lengths(1, (1,))]


def test_a_full_disk_ends_the_record_and_nothing_else(caplog):
    log = LengthLog("/dev/full")
    for _ in range(2):
        log.add(ScoreRequest((1,), [[3]]))
    log.close()
    assert [record.message for record in caplog.records] == [
        "/dev/full: no more lengths are recorded ([Errno 28] No space left on device)"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        (
            '{"prefix": 1, "items": [2]}\nnonsense\n{"prefix": 1}\n{"prefix": 0, "items": [1]}\n'
            '{"prefix": 1, "items": []}',
            "these lines are not lengths: 2, 3, 4, 5; record it",
        ),
        ("nonsense\n", "these lines are not lengths: 1; record it"),
        ("nonsense\n" * 12, "7, 8, 9, 10 and 2 more; record it"),
    ],
)
def test_a_file_that_holds_no_lengths_says_which_lines(tmp_path, text, message):
    (tmp_path / "lengths.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_lengths(tmp_path / "lengths.jsonl")
    with pytest.raises(InputError, match=r"missing.jsonl \(No such file or directory\); record it with"):
        read_lengths(tmp_path / "missing.jsonl")


def test_a_request_alone_fills_launches_as_the_server_would():
    assert launch_fills([Lengths(40, (100, 60))], LATTICE) == [200]
    assert launch_fills([Lengths(40, (200,) * 9)], LATTICE) == [840, 840, 240]
    with pytest.raises(InputError, match="recorded with another one"):
        launch_fills([Lengths(65, (10,))], LATTICE)


def test_fitted_sizes_pad_least_of_all_choices():
    fills = [200, 210, 700, 705, 710, 120, 130, 1000]
    planned = fit(fills, LATTICE, num_programs=3)
    assert planned.launches.largest == 1024
    choices = itertools.combinations(range(128, 1024, 128), 2)
    best = min(padding(fills, Lattice(Buckets([*sizes, 1024]), 64, 256)) for sizes in choices)
    assert padding(fills, planned) == pytest.approx(best)
    assert padding(fills, fit(fills, LATTICE, num_programs=1)) > padding(fills, planned)


def test_a_plan_for_other_prompts_is_refused(tmp_path):
    (tmp_path / "lattice.json").write_text(json.dumps(LATTICE.to_json()))
    assert load_lattice(tmp_path / "lattice.json", LATTICE) == LATTICE
    other = Lattice.for_prompts(max_prefix_tokens=32, max_item_tokens=256)
    with pytest.raises(InputError, match="max_prefix_tokens 64, the bundle 32: plan it again"):
        load_lattice(tmp_path / "lattice.json", other)


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ({}, "max_prefix_tokens is missing"),
        ({**LATTICE.to_json(), "launches": ["many"]}, "launches must be a list of whole numbers"),
        ({**LATTICE.to_json(), "launches": []}, "bucket sizes must be positive and at least one"),
    ],
)
def test_a_file_that_is_no_plan_is_named(tmp_path, value, wrong):
    (tmp_path / "lattice.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=rf"lattice.json: no lattice of launch sizes: {wrong}"):
        load_lattice(tmp_path / "lattice.json", LATTICE)


def test_record_plan_serve(tmp_path):
    bundle = write_tiny_bundle(tmp_path)
    lengths, planned = tmp_path / "new" / "lengths.jsonl", tmp_path / "other" / "lattice.json"
    body = {"query": "bake", "documents": ["Baker", "Nurse"]}
    with running(bundle, tmp_path / "log", "--record-lengths", str(lengths)) as (_, client):
        wait_until_ready(client)
        first = client.post("/v1/rerank", json=body).json()["results"]
    command = [sys.executable, "-m", "serve.plan", "--bundle", str(bundle), "--lengths", str(lengths)]
    command += ["--out", str(planned), "--programs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "padding" in done.stdout
    assert json.loads(planned.read_text())["launches"] == [read_lattice(bundle).max_batch_tokens]
    with running(bundle, tmp_path / "log", "--lattice", str(planned)) as (_, client):
        wait_until_ready(client)
        again = client.post("/v1/rerank", json=body).json()["results"]
    assert [result["index"] for result in again] == [result["index"] for result in first]
    for one, other in zip(first, again, strict=True):
        assert one["relevance_score"] == pytest.approx(other["relevance_score"], abs=1e-6)
    wrong = subprocess.run([*command, "--programs", "0"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines() == ["error: --programs is 0; at least one is needed"]
    wrong = subprocess.run([*command, "--out", "/proc/l.json"], capture_output=True, text=True, check=False)
    assert re.fullmatch(r"error: cannot write /proc/l.json \(.+\); choose another --out\n", wrong.stderr)
