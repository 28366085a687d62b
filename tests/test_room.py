"""What a request is taken to need: embeddings by the encoder's rate, a search by all that it will rank."""

import asyncio
import concurrent.futures
import threading
import time

import pytest

from jaxsearch.bundle import load_bundle
from serve.batcher import DeadlineExceeded
from serve.engine import Engine
from serve.handlers import CHARACTERS_PER_TOKEN, Limits
from serve.protocol import SearchBody
from serve.search import SearchService
from serve.telemetry import Telemetry
from tests.live_server import device, serving
from tests.tiny_bundle import write_tiny_bundle

SLO_SECONDS = 8.0
LAUNCH_SECONDS = 0.8
RERANK = {"query": "bread", "documents": ["Baker."]}
SEARCH = {"query": "bread"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    bundle = load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle")))
    return Engine(bundle, Telemetry(), slo_seconds=SLO_SECONDS, max_queue_tokens=10**7)


@pytest.fixture(scope="module")
def client(engine):
    with serving(engine, Limits(max_items=100_000, max_request_tokens=10**7)) as client:
        yield client


@pytest.fixture
def busy(engine, client):
    """A client of a server whose launches are slow, as it has learned, and one of them is held; and what ends that."""
    gate, held = threading.Event(), threading.Event()
    gate.set()

    def before(_):
        time.sleep(LAUNCH_SECONDS)
        if not gate.is_set():
            held.set()
            gate.wait(30)

    with device(engine, before), concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert client.post("/v1/embeddings", json={"input": ["bread"] * 200}).status_code == 200
        assert client.post("/v1/search", json=SEARCH).status_code == 200
        assert client.post("/v1/rerank", json=RERANK).status_code == 200
        gate.clear()
        first = pool.submit(client.post, "/v1/rerank", json=RERANK)
        assert held.wait(10)
        yield client, pool, gate
        gate.set()
        assert first.result(30).status_code == 200


def test_embeddings_are_taken_by_the_encoders_rate_and_searches_by_the_rankers(engine, busy):
    client, pool, gate = busy
    rate = engine.batcher.tokens_per_second
    texts = ["b" * CHARACTERS_PER_TOKEN * 10] * int(SLO_SECONDS * rate / 8)
    assert len(texts) * 10 / rate > SLO_SECONDS  # too much for the ranker
    refused = client.post("/v1/rerank", json={"query": "bread", "documents": texts})
    assert refused.status_code == 429
    assert "alone takes" in refused.json()["message"]
    embedded = pool.submit(client.post, "/v1/embeddings", json={"input": texts})
    time.sleep(0.2)
    gate.set()
    assert embedded.result(30).status_code == 200


def test_a_search_that_would_be_late_is_refused_before_anything_is_done(engine, busy):
    client, _, _ = busy
    ranker = engine.bundle.ranker
    texts = [engine.bundle.vertical.document_text(each, ranker.view) for each in engine.bundle.documents]
    seconds = sum(map(len, ranker.request("bread", texts).items)) / engine.batcher.tokens_per_second
    assert seconds > 0.1
    embedded = engine.bundle.encoder.encode_queries(["bread"])
    assert seconds > 5 * len(embedded[0]) / engine.batcher.tokens_per_second
    refused = client.post("/v1/search", json=SEARCH | {"timeout_ms": 600 * seconds}, timeout=5)
    assert refused.status_code == 429
    assert "alone takes" in refused.json()["message"]


def test_more_searches_than_the_host_can_do_are_refused(engine):
    gate, held = threading.Event(), threading.Event()

    def before(_):
        held.set()
        gate.wait(30)

    with (
        serving(engine, Limits(max_searches=1)) as client,
        device(engine, before),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(client.post, "/v1/search", json=SEARCH)
        assert held.wait(10)
        refused = client.post("/v1/search", json=SEARCH | {"order": "bm25"})
        assert refused.status_code == 429
        assert "1 searches are under way already" in refused.json()["message"]
        assert int(refused.headers["retry-after"]) >= 1
        gate.set()
        assert first.result(30).status_code == 200
        assert client.post("/v1/search", json=SEARCH | {"order": "bm25"}).status_code == 200


def test_a_search_that_waits_for_the_host_is_given_up_at_its_deadline(engine):
    gate, body = threading.Event(), SearchBody(query="bread", order="bm25")

    async def never(_):
        raise AssertionError("words alone need no device")

    with concurrent.futures.ThreadPoolExecutor(1) as host:
        service = SearchService(engine, host, max_searches=1)
        host.submit(gate.wait, 30)
        plan = service.plan(body)
        with pytest.raises(DeadlineExceeded):
            asyncio.run(service.search(body, plan, never, time.monotonic() + 0.05))
        gate.set()
        assert asyncio.run(service.search(body, plan, never, None))["results"]
