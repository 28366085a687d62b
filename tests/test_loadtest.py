"""The load test against a real server of tiny random models, in phases of a second."""

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxsearch.errors import InputError
from jaxsearch.scoring.load import Reply, Sample, poisson_arrivals, summarize
from serve.batcher import Batcher
from serve.load_client import parse_metrics, read_texts
from serve.load_phases import Phase, expected_tail
from serve.load_report import Report, write_report
from tests.live_server import running, wait_until_ready
from tests.tiny_bundle import write_tiny_bundle

ROOT = Path(__file__).parent.parent
PHASES = ("alone", "saturation", "load", "overload", "recovery")
SHORT = [
    word
    for phase, seconds in zip(PHASES, ("0.7", "1", "1.5", "1.5", "5"), strict=True)
    for word in (f"--{phase}-seconds", seconds)
]
SMALL = ["--items", "100", "--query-words", "2", "--connections", "3"]
"""Large requests of small texts, so that the tiny server is slower than its client."""


def loadtest(*options):
    command = [sys.executable, "-m", "serve.loadtest", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    bundle = write_tiny_bundle(tmp_path_factory.mktemp("bundle"))
    log = tmp_path_factory.mktemp("serve") / "log"
    with running(bundle, log, "--max-queue-tokens", "30000", "--slo-ms", "20000") as (_, client):
        wait_until_ready(client)
        yield str(client.base_url).rstrip("/")


@pytest.fixture(scope="module")
def report(url, tmp_path_factory):
    """One whole run, with limits that a busy machine keeps too."""
    out = tmp_path_factory.mktemp("loadtest")
    lenient = [
        "--load-share",
        "0.3",
        "--min-answered",
        "0.1",
        "--max-growth",
        "2",
    ]
    done = loadtest("--url", url, "--out", str(out), *SMALL, *SHORT, *lenient)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, json.loads((out / "loadtest.json").read_text()), done.stdout


def test_a_run_measures_every_phase(report):
    _, found, _ = report
    assert [phase["name"] for phase in found["phases"]] == list(PHASES)
    alone, saturation, load, overload, recovery = found["phases"]
    for phase in found["phases"]:
        assert phase["num_errors"] == 0
        assert phase["recompiles"] == 0
        assert 0 < phase["client_cpu_share"] < 1
        assert phase["lag_p99_ms"] >= 0
    assert 0 < alone["p50_ms"] <= alone["p95_ms"] <= alone["p99_ms"]
    assert found["capacity"] == saturation["items_per_second"] > 0
    assert 0 < saturation["device_busy_share"] <= 1
    assert saturation["launch_seconds"]
    assert len(load["memory_bytes"]) > 4
    assert -0.5 < load["memory_growth_share"] < 0.5
    assert found["slo_seconds"] == 20.0  # which the server says
    assert "answered in time at overload" in [check["name"] for check in found["checks"]]
    assert found["findings"]["in_time_share"] == overload["goodput_items_per_second"] / found["capacity"]
    assert load["num_refused"] == 0 or load["num_refused"] < overload["num_refused"]
    assert overload["num_refused"] > 0
    findings = found["findings"]
    assert findings["recovery_seconds"] >= 0
    assert recovery["num_requests"] >= 5
    assert findings["p99_over_p50_simulated"] >= 1
    assert findings["refused_share"] == overload["num_refused"] / overload["num_requests"]
    assert findings["patient_wait_seconds"] > 0
    assert found["server"]["name"] == "tiny"


def test_a_run_writes_table_samples_and_picture(report):
    out, found, printed = report
    text = (out / "loadtest.md").read_text(encoding="utf-8")
    for check in found["checks"]:
        assert check["is_passed"]
        assert f"ok: {check['name']} (" in text
        assert f"ok: {check['name']} (" in printed
    assert "not said" not in text
    assert "no service level" not in text  # the server promises one
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == sum(phase["num_requests"] for phase in found["phases"])
    refused = [sample for sample in samples if sample["status"] == 429]
    assert all(sample["retry_after_seconds"] >= 1 for sample in refused)
    assert (out / "loadtest.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_check_is_named_and_other_dialects_are_driven(url, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "Bake bread at night."}\n{"text": "Write code."}\n')
    short = [word if word.startswith("--") else "0.5" for word in SHORT]
    done = loadtest(
        "--url", url, "--out", str(tmp_path), "--texts", str(texts), "--format", "tei",
        *SMALL, *short, "--slo-ms", "0.001",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "p99 at load within SLO" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "FAILED: recovery" in done.stdout


def test_wrong_input_is_one_line(url, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"txt": "b"}\n')
    for options, message in (
        (["--url", "http://127.0.0.1:9"], "no server at http://127.0.0.1:9"),
        (["--url", "nowhere"], "no server at nowhere"),
        (["--url", "http://localhost:notaport"], "http://localhost:notaport is no address"),
        (["--url", url, "--format", "score", "--model", "gpt"], "model 'gpt' is not served here"),
        (["--url", url, "--texts", str(broken)], "broken.jsonl:2: not a JSON object"),
        (["--url", url, *SMALL, "--out", "/proc/none"], "cannot write to /proc/none"),
    ):
        done = loadtest("--out", str(tmp_path / "out"), *options)
        assert done.returncode == 2, done.stdout + done.stderr
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_texts_are_lines_or_json(tmp_path):
    plain = tmp_path / "texts.txt"
    plain.write_text("a b\nc\n")
    assert [text for text in read_texts(str(plain)) if text] == ["a b", "c"]
    with pytest.raises(InputError, match=r"none.txt \(No such file or directory\); give --texts a file"):
        read_texts(str(tmp_path / "none.txt"))


def test_metrics_of_other_servers_are_left_out():
    said = parse_metrics(
        'te_queue_size 3.0\nbatch_seconds_count{tokens="64"} 2.0\nbatch_seconds_sum{tokens="64"} 0.5\n'
    )
    assert said.launches == {64: (2.0, 0.5)}
    assert said.memory_bytes is None
    later = parse_metrics('batch_seconds_count{tokens="64"} 3.0\nbatch_seconds_sum{tokens="64"} 0.75\n')
    assert later.launches_since(said) == {64: (1.0, 0.25)}
    assert said.launches_since(said) == {}


def test_a_launch_counts_in_each_phase_for_its_part():
    counts = 'batch_seconds_count{{tokens="64"}} {}\nbatch_seconds_sum{{tokens="64"}} {}\nbatch_running_seconds {}\n'
    before = parse_metrics(counts.format(1, 5.0, 0.75), read=10.0)
    after = parse_metrics(counts.format(2, 6.0, 0.125), read=10.5)
    assert after.busy_share_since(before) == pytest.approx(
        0.75
    )  # 0.25 s of the first launch, 0.125 s of the next
    assert parse_metrics(counts.format(2, 6.5, 0.2), read=10.5).busy_share_since(before) == 1
    assert after.busy_share_since(after) is None


def test_the_server_says_how_long_the_running_launch_has_had_the_device():
    now, has_begun, may_end = [1.0], threading.Event(), threading.Event()

    class Work:
        is_waiting = True

        def join(self, *_):
            self.is_waiting = False
            return 5

        def result(self):
            return "done"

    class Launcher:
        open = object
        count = staticmethod(lambda *_: None)

        def run(self, *_):
            has_begun.set()
            assert may_end.wait(10)
            return {}

    batcher = Batcher(max_queue_tokens=9, launcher=Launcher(), clock=lambda: now[0])
    assert batcher.running_seconds == 0
    future = batcher.submit(Work(), 5)
    assert has_begun.wait(10)
    now[0] = 3.5
    assert batcher.running_seconds == 2.5
    may_end.set()
    assert future.result(10).value == "done"
    batcher.close()
    assert batcher.running_seconds == 0


@pytest.mark.parametrize(("slo_ms", "is_told"), [(None, True), (100.0, False)])
def test_that_no_level_is_promised_is_said(tmp_path, slo_ms, is_told):
    found = Report(
        url="http://x", date="today", settings={"slo_ms": None, "items": 3}, server={"slo_ms": slo_ms},
        slo_seconds=0.1, capacity=1.0, phases=[phase(np.zeros(1), [0.1], {})] * 5, findings={}, checks=[],
    )  # fmt: skip
    write_report(found, tmp_path)
    text = (tmp_path / "loadtest.md").read_text(encoding="utf-8")
    assert ("the server promises no service level" in text) == is_told
    assert "today. items 3.\n" in text


def phase(arrivals, latencies, launches, tokens=None, memory=()):
    samples = [
        Sample(due, due, due + latency, Reply(200, tokens=tokens))
        for due, latency in zip(arrivals.tolist(), latencies, strict=True)
    ]
    summary = summarize(samples, items_per_request=1)
    return Phase("load", samples, summary, 0.1, launches, None, memory, None)


def test_expected_tail_is_the_one_of_the_simulation():
    """Requests of 100 tokens, 10 ms each on the device and 5 ms elsewhere; only one fits a launch."""
    arrivals = poisson_arrivals(60.0, 60.0, np.random.default_rng(0))
    launches = {100: (float(len(arrivals)), 0.01 * len(arrivals))}
    alone = phase(np.zeros(1), [0.015], launches)
    load = phase(arrivals, [0.02] * len(arrivals), launches, tokens=120)
    tail = expected_tail(alone, load, arrivals, 100)
    assert tail is not None
    free, latencies = 0.0, []
    for due in arrivals:
        free = max(free, due) + 0.01
        latencies.append(free - due + 0.005)
    latencies = sorted(latencies)
    p50, p99 = (latencies[math.ceil(part * len(latencies)) - 1] for part in (0.5, 0.99))
    assert tail == pytest.approx(p99 / p50, rel=1e-6)
    assert expected_tail(alone, phase(arrivals, [0.02] * len(arrivals), {}), arrivals, 100) is None


def test_memory_growth_is_told_from_swings():
    def growth(*memory):
        return phase(np.zeros(1), [0.1], {}, memory=memory).memory_growth_share

    assert growth() is None
    assert growth(100.0) == 0
    assert growth(*[98.0, 102.0] * 8) == 0
    assert growth(*[98.0, 102.0] * 2, *[100.0] * 8, *[108.0, 112.0] * 2) == pytest.approx(0.1)
