"""The life of the server process: its options, overload, SIGTERM under load, and a start that cannot be."""

import concurrent.futures
import http.client
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxsearch.bundle import SCORE_TOLERANCE
from tests.live_server import running, wait_until_ready
from tests.tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="module")
def bundle_directory(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


def test_overload_is_429_with_a_retry_after_that_works(bundle_directory, tmp_path):
    body = {"query": "a", "documents": ["b" * 40] * 200}
    with running(bundle_directory, tmp_path / "log", "--max-queue-tokens", "1000") as (process, client):
        wait_until_ready(client)
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            replies = list(pool.map(lambda _: client.post("/v1/rerank", json=body), range(24)))
            statuses = {reply.status_code for reply in replies}
            assert statuses == {200, 429}
            refused = next(reply for reply in replies if reply.status_code == 429)
            assert "tokens wait already, at most 1000 may" in refused.json()["message"]
            time.sleep(int(refused.headers["retry-after"]))
            assert client.post("/v1/rerank", json=body).status_code == 200
            # SIGTERM with requests in flight: every accepted one is answered
            flight = pool.submit(client.post, "/v1/rerank", json={**body, "documents": ["b" * 40] * 1000})
            while client.get("/info").json()["queue_tokens"] == 0:
                assert not flight.done()
            process.send_signal(signal.SIGTERM)
            assert flight.result(60).status_code == 200
        assert process.wait(60) == 0


def test_what_would_be_answered_too_late_is_refused_at_once(bundle_directory, tmp_path):
    body = {"query": "a", "documents": ["b" * 40] * 200}
    options = ("--slo-ms", "1", "--max-queue-tokens", "1000000")
    with running(bundle_directory, tmp_path / "log", *options) as (_, client):
        wait_until_ready(client)
        assert client.get("/info").json()["slo_ms"] == 1
        assert client.post("/v1/rerank", json=body).status_code == 200  # nothing waits
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda _: client.post("/v1/rerank", json=body), range(16)))
        assert {reply.status_code for reply in replies} == {200, 429}
        refused = next(reply for reply in replies if reply.status_code == 429)
        assert re.search(r"\b[01] ms are left", refused.json()["message"])
        assert int(refused.headers["retry-after"]) >= 1


def test_a_request_may_say_how_long_it_waits(bundle_directory, tmp_path):
    body = {"query": "a", "documents": ["b"]}
    with running(bundle_directory, tmp_path / "log") as (_, client):
        wait_until_ready(client)
        for value, status in (("30000", 200), ("0.0001", 504), ("soon", 400), ("-1", 400), ("inf", 400)):
            reply = client.post("/v1/rerank", json=body, headers={"x-timeout-ms": value})
            assert reply.status_code == status, value
            assert status != 400 or "x-timeout-ms must be a number of milliseconds" in reply.json()["message"]


def test_precision_and_attention_are_chosen_at_the_start(bundle_directory, tmp_path):
    body, scores = {"query": "a", "items": ["b", "c d e"]}, {}
    for options, dtype, use_kernel in (
        ((), "float32", False),
        (("--dtype", "bfloat16", "--kernel"), "bfloat16", True),
    ):
        with running(bundle_directory, tmp_path / "log", *options) as (_, client):
            wait_until_ready(client)
            info = client.get("/info").json()
            assert (info["dtype"], info["use_kernel"]) == (dtype, use_kernel)
            warned = (
                "warning: on a CPU --kernel is interpreted, which is slow" in (tmp_path / "log").read_text()
            )
            assert warned == use_kernel
            scores[dtype] = np.array(client.post("/v1/score", json=body).json()["logits"])
    difference = np.abs(scores["float32"] - scores["bfloat16"]).max()
    assert 0 < difference < SCORE_TOLERANCE["bfloat16"]


def test_a_body_that_is_too_large_is_refused_before_it_has_come(bundle_directory, tmp_path):
    with running(bundle_directory, tmp_path / "log", "--max-body-bytes", "1000") as (_, client):
        wait_until_ready(client)
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection:
            head = "POST /v1/rerank HTTP/1.1\r\nhost: loopback\r\ncontent-length: 99999999999\r\n\r\n{}"
            connection.sendall(head.encode())
            with http.client.HTTPResponse(connection) as reply:
                reply.begin()
                assert reply.status == 413
                assert b"the body has 99999999999 bytes, at most 1000 are allowed" in reply.read()
        large = b" " * 10_000_000  # these are sent whole before the reply is read
        chunks = (large[:1_000_000] for _ in range(10))
        for content, told in ((large, "has 10000000 bytes"), (chunks, "has over 1000 bytes")):
            refused = client.post("/v1/rerank", content=content)
            assert (refused.status_code, told in refused.json()["message"]) == (413, True)
        assert client.post("/v1/rerank", json={"query": "a", "documents": ["b"]}).status_code == 200


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_damaged_bundle_and_a_taken_port_are_one_line(bundle_directory, tmp_path, taken_port):
    for options, message in (
        (["--bundle", str(tmp_path)], "holds no bundle"),
        (["--bundle", str(bundle_directory), "--port", str(taken_port)], "cannot listen on"),
    ):
        done = start(*options)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--max-items", "--max-body-bytes", "--max-queue-tokens"])
def test_a_limit_of_nothing_is_refused(option):
    done = start("--bundle", "none", option, "0")
    assert done.returncode == 2
    assert f"argument {option}: invalid number above 0 value: '0'" in done.stderr


def start(*options):
    command = [sys.executable, "-m", "serve.main", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_chunked_body_over_the_limit_is_refused_and_the_connection_lives_on(bundle_directory, tmp_path):
    with running(bundle_directory, tmp_path / "log", "--max-body-bytes", "1000") as (_, client):
        wait_until_ready(client)
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=5) as connection:
            head = b"POST /v1/rerank HTTP/1.1\r\nhost: loopback\r\ntransfer-encoding: chunked\r\n\r\n"
            connection.sendall(head + b"7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: loopback\r\n\r\n")
            received = b""
            while b"HTTP/1.1 200" not in received:
                received += connection.recv(1 << 16) or pytest.fail("the connection was closed")
