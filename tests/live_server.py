"""The server over loopback: as a process of its own, or in a thread for tests that reach into its engine."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import uvicorn

from serve.routes import create_app

READY_SECONDS = 180


@contextlib.contextmanager
def serving(engine, limits=None):
    """The application in a thread of this process, ready; yields a client."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(engine, limits), log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        host, port = listener.getsockname()
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client:
            wait_until_ready(client)
            yield client
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def device(engine, before):
    """Every scoring program calls `before` with its tokens, then runs."""
    programs = dict(engine.scorer._programs)

    def wrapped(size, program):
        def run(weights, base, ints, labels):
            before(np.asarray(ints)[:size])
            return program(weights, base, ints, labels)

        return run

    engine.scorer._programs.update({size: wrapped(size, program) for size, program in programs.items()})
    try:
        yield
    finally:
        engine.scorer._programs.update(programs)


@contextlib.contextmanager
def running(bundle, log, *options):
    """`python -m serve.main` on a free port; yields the process and a client."""
    command = [sys.executable, "-m", "serve.main", "--bundle", str(bundle), "--port", "0", *options]
    environment = {**os.environ, "JAXSEARCH_CACHE": str(bundle.parent / "cache")}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not (found := re.search(r"http://[\d.:]+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with httpx.Client(base_url=found[0], timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


def wait_until_ready(client):
    deadline = time.monotonic() + READY_SECONDS
    while (reply := client.get("/ready")).status_code != 200:
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert time.monotonic() < deadline, reply.text
        time.sleep(0.2)


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def said_when_ready(log):
    """What the server of `running` has printed, up to "ready", which it says after it answers so."""
    deadline = time.monotonic() + READY_SECONDS
    while "ready after" not in (said := log.read_text()):
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
    return said
