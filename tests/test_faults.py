"""What goes wrong around requests: a failing device, clients that leave or dawdle, SIGTERM, a spoilt bundle."""

import collections
import concurrent.futures
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest

from jaxsearch.bundle import MANIFEST, load_bundle
from serve.engine import Engine
from serve.handlers import Limits
from serve.telemetry import Telemetry
from tests.live_server import device, running, serving, wait_for, wait_until_ready
from tests.tiny_bundle import relist, write_tiny_bundle

MARK = "~"
"""A document with it meets the device's fault."""
FAULT = "RESOURCE_EXHAUSTED: out of memory while allocating"
SHORT = {"query": "bread", "documents": ["Baker.", "Nurse."]}
LONG = {"query": "long", "documents": ["w" * 90] * 1600}
STEP_SECONDS = 0.005
PROMPT_SECONDS = 20.0
"""Of a short request's latency while others dawdle, who would never end; measured 0.04 on 2 busy cores."""


@pytest.fixture(scope="module")
def bundle_directory(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def engine(bundle_directory):
    return Engine(load_bundle(bundle_directory), Telemetry(), max_queue_tokens=10**7)


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine, Limits(max_items=10_000, max_request_tokens=10**7)) as client:
        yield client


@pytest.fixture
def failing_device(engine):
    """Fails on a batch that holds `MARK`, slowly enough that other requests come in between."""
    (mark,) = engine.bundle.ranker.tokenizer.encode_template(MARK)

    def before(tokens):
        time.sleep(STEP_SECONDS)
        if (tokens == mark).any():
            raise RuntimeError(FAULT)

    with device(engine, before):
        yield


@pytest.fixture
def slow_device(engine):
    with device(engine, lambda _: time.sleep(STEP_SECONDS)):
        yield


@pytest.fixture
def held_device(server, engine):
    """The device has scored something, and is busy until the yielded function is called."""
    assert post(server).status_code == 200
    gate = threading.Event()
    started = threading.Barrier(1 + engine.scorer.num_concurrent, timeout=30)

    def steps():
        started.wait()
        gate.wait(30)
        return None
        yield

    for _ in range(engine.scorer.num_concurrent):
        engine.batcher.submit(steps(), 1000 // engine.scorer.num_concurrent)
    started.wait()
    yield gate.set
    gate.set()


def post(client, body=SHORT, path="/v1/rerank", **options):
    return client.post(path, json=body, **options)


def connect(client):
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=60)


def message(body, path="/v1/rerank"):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: loopback\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
    return head.encode() + content


def answer(connection):
    """Status and JSON of what is still to be read."""
    received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, content = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(content)


def count(client, path, status):
    name = re.escape(f'requests_total{{path="{path}",status="{status}"}}')
    found = re.search(rf"^{name} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_a_fault_on_the_device_fails_its_own_request_only(server, engine, failing_device, caplog):
    expected = post(server).json()["results"]
    bad = {"query": "unlucky", "documents": ["w" * 90] * 40 + [MARK]}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        failing = pool.submit(post, server, bad, headers={"x-request-id": "unlucky-1"})
        around = list(pool.map(lambda _: post(server), range(30)))
        reply = failing.result()
    assert [other.json()["results"] for other in around] == [expected] * 30
    assert reply.status_code == 500
    assert (reply.json()["type"], reply.json()["code"]) == ("server_error", "internal")
    assert reply.json()["id"] == reply.headers["x-request-id"] == "unlucky-1"
    assert "unlucky-1" in reply.json()["message"]
    assert not re.search(r"Traceback|RESOURCE|Error|\.py", reply.text)
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "unlucky-1" in record.getMessage()
    assert FAULT in caplog.text
    tei = post(server, {"query": "unlucky", "texts": [MARK]}, "/rerank")
    assert (tei.status_code, tei.json()["error_type"]) == (424, "Backend")
    assert engine.batcher.queue_tokens == 0
    assert post(server, {**bad, "documents": ["fine"]}).status_code == 200
    assert post(server).json()["results"] == expected


def test_the_work_of_a_client_that_left_is_dropped(server, engine, slow_device):
    begun = time.monotonic()
    assert post(server, LONG).status_code == 200
    whole_seconds = time.monotonic() - begun
    assert whole_seconds > 200 * STEP_SECONDS
    left_before = count(server, "/v1/rerank", 499)
    with connect(server) as connection:
        connection.sendall(message(LONG))
        wait_for(lambda: engine.batcher.queue_tokens > 0)
    begun = time.monotonic()
    assert post(server).status_code == 200
    wait_for(lambda: engine.batcher.queue_tokens == 0)
    dropped_seconds = time.monotonic() - begun
    assert dropped_seconds < whole_seconds / 2  # measured 0.25 of 2.5 s
    wait_for(lambda: count(server, "/v1/rerank", 499) == left_before + 1)


def test_a_crowd_is_refused_before_it_is_tokenised(server, engine, monkeypatch):
    gate, encode = threading.Event(), engine.bundle.ranker.request

    def held(query, texts):
        gate.wait(30)
        return encode(query, texts)

    monkeypatch.setattr(engine.bundle.ranker, "request", held)
    monkeypatch.setattr(engine.batcher, "max_queue_tokens", 1000)
    body = {"query": "crowd", "documents": ["w" * 100] * 24}  # about 600 tokens
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(post, server, body) for _ in range(4)]
        wait_for(lambda: sum(future.done() for future in asked) == 3)
        gate.set()
        replies = [future.result() for future in asked]
    assert sorted(reply.status_code for reply in replies) == [200, 429, 429, 429]
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies if reply.status_code == 429)
    assert post(server).status_code == 200


def test_long_texts_count_as_what_is_kept_of_them(server, engine, held_device, monkeypatch):
    monkeypatch.setattr(engine.batcher, "max_queue_tokens", 2000)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, server, {"query": "long", "documents": ["w" * 100_000] * 2})
        wait_for(lambda: asked.done() or engine.batcher.queue_tokens > 1000)
        held_device()
        assert asked.result().status_code == 200


def test_a_client_that_leaves_while_it_sends_is_no_fault_of_ours(server, caplog):
    left_before = count(server, "/v1/rerank", 499)
    with connect(server) as connection:
        connection.sendall(message(LONG)[:1000])
        time.sleep(0.1)
    wait_for(lambda: count(server, "/v1/rerank", 499) == left_before + 1)
    assert not caplog.records


def test_slow_senders_and_slow_readers_hold_up_nobody(server):
    bodies = [message({"query": f"query {i}", "documents": ["Baker."]}) for i in range(8)]
    large = {"query": "large", "documents": ["x" * 20_000] * 500, "return_documents": True}
    with contextlib.ExitStack() as stack:
        senders = [stack.enter_context(connect(server)) for _ in bodies]
        readers = [stack.enter_context(connect(server)) for _ in range(4)]
        for reader in readers:
            reader.sendall(message(large))
        firsts = [reader.recv(1) for reader in readers]
        for place in range(40):
            for sender, body in zip(senders, bodies, strict=True):
                sender.sendall(body[place : place + 1])
            firsts = [read + reader.recv(10) for read, reader in zip(firsts, readers, strict=True)]
            begun = time.monotonic()
            assert post(server).status_code == 200
            assert time.monotonic() - begun < PROMPT_SECONDS
        for sender, body in zip(senders, bodies, strict=True):
            sender.sendall(body[40:])
            status, reply = answer(sender)
            assert (status, len(reply["results"])) == (200, 1)
        for first, reader in zip(firsts, readers, strict=True):
            assert first.startswith(b"HTTP/1.1 200 OK\r\n")
            rest = b"".join(iter(lambda reader=reader: reader.recv(1 << 20), b""))
            reply = json.loads((first + rest).partition(b"\r\n\r\n")[2])
            assert len(reply["results"]) == 500


def test_a_short_request_does_not_wait_for_a_long_one(server, engine, slow_device):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        long = pool.submit(post, server, LONG)
        wait_for(lambda: engine.batcher.queue_tokens > 0)
        assert post(server).status_code == 200
        assert not long.done()
        assert long.result().status_code == 200


def test_retry_after_is_the_time_that_the_excess_takes(server, engine, held_device, monkeypatch):
    """The rate is what the device did until now; nothing drains while it is held."""
    monkeypatch.setattr(engine.batcher, "max_queue_tokens", 1000)
    rate = engine.batcher.tokens_per_second
    reply = post(server, {"query": "late", "documents": ["w" * 64] * 100})
    held_device()
    assert reply.status_code == 429
    assert reply.json()["code"] == "queue_full"
    excess = 1000  # all that waits: the request alone is larger than what may
    milliseconds = int(reply.headers["retry-after-ms"])
    assert milliseconds == int(np.ceil(1000 * max(excess / rate, 0.05)))
    assert int(reply.headers["retry-after"]) == int(np.ceil(milliseconds / 1000))
    assert post(server).status_code == 200


def test_a_deadline_that_passes_in_the_queue_is_504(server, engine, held_device):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        late = pool.submit(post, server, {"query": "late", "timeout_ms": 3000}, "/v1/search")
        wait_for(lambda: late.done() or engine.batcher.queue_tokens > 1000)
        time.sleep(3.01)
        held_device()
        assert late.result().status_code == 504
    assert late.result().json()["code"] == "deadline_exceeded"
    assert post(server, {"query": "late", "timeout_ms": 30_000}, "/v1/search").status_code == 200


@pytest.mark.parametrize("value", ["r" * 127 + " r", "\u00e9", "a b", ""])
def test_any_request_id_can_be_given_back(server, value):
    reply = post(server, headers={"x-request-id": value.encode("latin-1")})
    assert reply.status_code == 200
    assert reply.headers["x-request-id"]


def ask_until_refused(address, keeps_connection):
    """Outcomes of one client that asks without pause until it is told to stay away."""
    outcomes = collections.Counter()
    headers = {} if keeps_connection else {"connection": "close"}
    with httpx.Client(base_url=address, timeout=60, headers=headers) as client:
        while True:
            try:
                reply = post(client, {"query": "bread", "documents": ["Baker." * 5] * 20})
            except httpx.HTTPError as error:
                outcomes[type(error).__name__] += 1
                return outcomes
            outcomes[reply.status_code] += 1
            if reply.status_code != 200:
                return outcomes


def test_sigterm_under_load_answers_what_was_accepted(bundle_directory, tmp_path):
    log = tmp_path / "log"
    with running(bundle_directory, log, "--max-queue-tokens", "100000") as (process, client):
        wait_until_ready(client)
        halves = message(SHORT)[:-5], message(SHORT)[-5:]
        with concurrent.futures.ThreadPoolExecutor(8) as pool, connect(client) as slow:
            asking = [pool.submit(ask_until_refused, client.base_url, i % 2 == 0) for i in range(8)]
            slow.sendall(halves[0])
            time.sleep(1.0)
            process.send_signal(signal.SIGTERM)
            outcomes = sum((future.result() for future in asking), collections.Counter())
            slow.sendall(halves[1])
            assert answer(slow)[0] == 200
        assert process.wait(60) == 0
    assert outcomes[200] >= 8
    assert outcomes.keys() <= {200, 503, "ConnectError"}, outcomes
    assert "Traceback" not in log.read_text()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def forget(directory):
    """Another score is expected than the ranker gives; every digest is right."""
    answers = json.loads((directory / "selftest.json").read_text())
    (directory / "selftest.json").write_text(json.dumps([{**answers[0], "scores": [100.0, -100.0]}]))
    relist(directory)


def damage(directory):
    flip(directory / "ranker" / "model.safetensors")
    truncate(directory / "index" / "embeds.npy")
    (directory / "encoder" / "tokenizer.json").unlink()
    (directory / "foreign.pickle").write_bytes(b"")


DAMAGED = """error: bundle is damaged; export it again
  missing: encoder/tokenizer.json
  not in the manifest: foreign.pickle
  changed: index/embeds.npy
  changed: ranker/model.safetensors
"""


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (damage, DAMAGED),
        (
            lambda directory: (directory / MANIFEST).write_text("{"),
            r"error: cannot read bundle/bundle\.json .* export the bundle again\n",
        ),
        (
            forget,
            r"error: not ready: self-test failed: 'bake bread' scored .* than the one that exported it\n",
        ),
    ],
    ids=["files", "manifest", "self-test"],
)
def test_a_spoilt_bundle_is_refused(bundle_directory, tmp_path, spoil, told):
    copy = shutil.copytree(bundle_directory, tmp_path / "bundle")
    spoil(copy)
    command = [sys.executable, "-m", "serve.main", "--bundle", str(copy), "--port", "0"]
    environment = {**os.environ, "JAXSEARCH_CACHE": str(bundle_directory.parent / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert re.fullmatch(told, done.stderr.replace(str(copy), "bundle")), done.stderr
