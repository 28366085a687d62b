"""Runs of a bundle's orders: each by the library's stages, the default once more by the bundle's own search, and, where
one is running, by its server."""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsearch.bundle import Bundle
from jaxsearch.data.records import Query, Run
from jaxsearch.errors import InputError
from jaxsearch.search.searcher import RETRIEVE_DEPTH, Searcher, SearchRequest
from train.options import progress

TIMEOUT_SECONDS = 120


def order_runs(
    searcher: Searcher, queries: Sequence[Query], orders: Sequence[str], name: str = "orders"
) -> dict[str, Run]:
    """A run for each order; the ranker reads a query's candidates once for all of them."""
    runs: dict[str, Run] = {order: {} for order in orders}
    with progress(name, len(queries)) as advance:
        for query in queries:
            embed = searcher.encoder.embed_queries([query.text])[0]
            nearest = searcher.nearest(embed, min(RETRIEVE_DEPTH, len(searcher.documents)), None)
            known: dict[tuple[int, ...], np.ndarray] = {}
            for order in orders:
                request = SearchRequest(query.text, order=order)
                plan = searcher.plan(request)
                uses_embedding = "embedding" in plan.sources
                candidates = searcher.find(query.text, plan, None, embed if uses_embedding else None, nearest)
                positions = tuple(searcher.to_rank(plan, candidates))
                if positions and positions not in known:
                    known[positions] = searcher.rank(searcher.prompt(query.text, positions))
                reply = searcher.shape(request, plan, candidates, None, known.get(positions, np.zeros(0)))
                runs[order][query.id] = _ranked([result.id for result in reply.results])
            advance()
    return runs


def served_run(bundle: Bundle, queries: Sequence[Query]) -> Run:
    """What `Bundle.search` answers: the default of everything."""
    run: Run = {}
    with progress("served", len(queries)) as advance:
        for query in queries:
            reply = bundle.search(query.text, top_k=RETRIEVE_DEPTH)
            run[query.id] = _ranked([result.id for result in reply.results])
            advance()
    return run


def server_run(address: str, queries: Sequence[Query], revision: str) -> Run:
    """What a running server answers over HTTP to the same questions.

    Raises: InputError when there is no server, it serves another bundle than `revision`, or refuses a query.
    """
    served = _ask(f"{address.rstrip('/')}/info").get("model_revision")
    if served != revision:
        raise InputError(f"{address} serves revision {served}, the bundle is {revision}: serve this bundle")
    run: Run = {}
    with progress("server", len(queries)) as advance:
        for query in queries:
            body = {"query": query.text, "top_k": RETRIEVE_DEPTH, "fields": []}
            reply = _ask(f"{address.rstrip('/')}/v1/search", body)
            run[query.id] = _ranked([result["id"] for result in reply["results"]])
            advance()
    return run


def _ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        told = error.read().decode(errors="replace")[:300]
        raise InputError(f"{url} answered {error.code}: {told}") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{url} does not answer ({error}): start python -m serve.main with this bundle"
        ) from None


def _ranked(ids: Sequence[str]) -> dict[str, float]:
    return {document: float(-rank) for rank, document in enumerate(ids)}
