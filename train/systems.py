"""Runs of the systems that a report compares: BM25 and encoders alone, a bundle's orders, what it serves, its server,
other rankers, the judge."""

import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsearch.bundle import Bundle
from jaxsearch.data.records import Collection, Query, Run
from jaxsearch.data.verticals import Vertical
from jaxsearch.errors import InputError
from jaxsearch.judge import load_judge, predicted_grade
from jaxsearch.metrics import kappa_interval
from jaxsearch.ranker import load_ranker
from jaxsearch.retrieval import to_run
from jaxsearch.retrieval.exact import ExactIndex
from jaxsearch.retrieval.lexical import Bm25Index
from jaxsearch.search.candidates import RETRIEVE_DEPTH, Candidates
from jaxsearch.search.orders import arrange
from jaxsearch.search.requests import Plan, SearchRequest
from jaxsearch.search.searcher import Searcher
from train.first_stage import embed_corpus, rank_some
from train.inputs import load_retriever, offline_scorer
from train.label import label_pairs
from train.options import progress

QUERIES_AT_ONCE = 4
TIMEOUT_SECONDS = 120
REFUSED, BUSY = 400, (429, 503)
MAX_TRIES = 8


class Systems:
    """Runs over one collection; `bundle` is None where only BM25 and an encoder as it comes are asked for.

    Args:
      view: which view of a document `dense` reads.
      retriever: asset, hub name or folder of its encoder.
      dtype: of the judge's and other rankers' computation.
      num_samples, seed: of the bootstrap of the judge's agreement.
    """

    def __init__(
        self,
        collection: Collection,
        vertical: Vertical,
        bundle: Bundle | None,
        *,
        view: str,
        retriever: str,
        dtype: str,
        num_samples: int,
        seed: int,
    ):
        self.collection = collection
        self.vertical = vertical
        self.bundle = bundle
        self.judged: Run = {}
        self._ids = list(collection.documents)
        self._view = view
        self._retriever = retriever
        self._depth = min(RETRIEVE_DEPTH, len(self._ids))
        self._dtype = dtype
        self._num_samples = num_samples
        self._seed = seed

    def lexical(self, queries: Sequence[Query], view: str) -> Run:
        """BM25 over one view."""
        index = Bm25Index(self._texts(view), self._ids)
        hits = index.search([query.text for query in queries], self._depth)
        return to_run(hits, [query.id for query in queries], self._ids)

    def dense(self, queries: Sequence[Query]) -> Run:
        """The exhaustive search of an encoder as it comes."""
        encoder = load_retriever(self._retriever)
        index = ExactIndex(embed_corpus(encoder, self._texts(self._view)), self._ids)
        hits = index.search(encoder.embed_queries([query.text for query in queries]), self._depth)
        return to_run(hits, [query.id for query in queries], self._ids)

    def by_other_ranker(self, queries: Sequence[Query], name: str, folder: str) -> Run:
        """The order `ranker` with another ranker behind the bundle's first stage."""
        assert self.bundle is not None
        ours = self.bundle.searcher
        ranker = load_ranker(folder, dtype=self._dtype)
        searcher = Searcher(
            ours.documents,
            ours.vertical,
            encoder=ours.encoder,
            index=ours.index,
            bm25=ours.bm25,
            orders=ours.orders,
            ranker=ranker,
            make_scorer=lambda: offline_scorer(ranker),
        )
        return order_runs(searcher, queries, ["ranker"], name)["ranker"]

    def judge(self, folder: str, candidates: Run) -> tuple[Run, dict[str, Any]]:
        """The judge's expected grades of the candidates, and its agreement with the collection's grades."""
        judge = load_judge(folder, dtype=self._dtype)
        scorer = offline_scorer(judge)
        labels = []
        queries = list(candidates)
        with progress("judge", len(queries)) as advance:
            for start in range(0, len(queries), QUERIES_AT_ONCE):
                part = queries[start : start + QUERIES_AT_ONCE]
                pairs = [(query, document) for query in part for document in candidates[query]]
                labels += label_pairs(judge, scorer, self.collection, self.vertical, pairs)
                advance(len(part))
        self.judged = {query: {} for query in queries}
        for label in labels:
            self.judged[label.query_id][label.document_id] = label.expected_grade
        kappa = kappa_interval(
            predicted_grade(np.array([label.grade_probs for label in labels])),
            [self.collection.grade(label.query_id, label.document_id) for label in labels],
            groups=[label.query_id for label in labels],
            num_samples=self._num_samples,
            seed=self._seed,
        )
        agreement = {"weighted_kappa": kappa, "num_pairs": len(labels), "version": judge.version}
        return self.judged, agreement

    def _texts(self, view: str) -> list[str]:
        return [
            self.vertical.document_text(document, view) for document in self.collection.documents.values()
        ]


def order_runs(
    searcher: Searcher, queries: Sequence[Query], orders: Sequence[str], name: str = "orders"
) -> dict[str, Run]:
    """A run for each order; the ranker reads a query's candidates once for all of them.

    A query that is too long for the ranker has found nothing in the orders that use it.
    """
    plans = [searcher.plan(SearchRequest(query="", order=order)) for order in orders]
    ranking = next((plan for plan in plans if plan.rank_depth), None)  # every one ranks the same documents
    runs: dict[str, Run] = {order: {} for order in orders}
    with progress(name, len(queries)) as advance:
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            part = queries[start : start + QUERIES_AT_ONCE]
            both = searcher.find_all([query.text for query in part], RETRIEVE_DEPTH)
            found = {query.id: candidates for query, candidates in zip(part, both, strict=True)}
            scores: dict[str, np.ndarray] = {}
            if ranking is not None:
                heads = {key: ranking.to_rank(ranking.cut(candidates)) for key, candidates in found.items()}
                scores = rank_some(searcher, part, heads)
            for plan, (key, candidates) in itertools.product(plans, found.items()):
                is_refused = plan.rank_depth > 0 and key not in scores
                ids = [] if is_refused else _arranged(searcher, plan, candidates, scores.get(key, ()))
                runs[plan.order.name][key] = _ranked(ids)
            advance(len(part))
    return runs


def _arranged(
    searcher: Searcher, plan: Plan, found: Candidates, ranker_scores: np.ndarray | Sequence[float]
) -> list[str]:
    """Ids of what a search by this plan finds, best first, from what all sources found."""
    candidates = plan.cut(found.found_by(plan.sources))
    places, _ = arrange(candidates, plan.order, plan.first, ranker_scores)
    return [searcher.index.ids[position] for position in candidates.positions[places].tolist()]


def served_run(bundle: Bundle, queries: Sequence[Query]) -> Run:
    """The answers of `Bundle.search` with the default of everything; a query that it refuses has found nothing."""
    run: Run = {}
    with progress("served", len(queries)) as advance:
        for query in queries:
            try:
                reply = bundle.search(query.text, top_k=RETRIEVE_DEPTH)
                run[query.id] = _ranked([result.id for result in reply.results])
            except InputError:  # too long for the ranker
                run[query.id] = {}
            advance()
    return run


def check_server(address: str, revision: str) -> None:
    """Raises: InputError when there is no server, or it serves another bundle than `revision`."""
    served = _ask(f"{address.rstrip('/')}/info").get("model_revision")
    if served != revision:
        raise InputError(f"{address} serves revision {served}, the bundle is {revision}: serve this bundle")


def server_run(address: str, queries: Sequence[Query]) -> Run:
    """The answers of a running server to the same questions; a query that it refuses with 400 has found nothing.

    Raises: InputError when it does not answer, fails, or is still too busy after `MAX_TRIES`.
    """
    run: Run = {}
    with progress("server", len(queries)) as advance:
        for query in queries:
            body = {"query": query.text, "top_k": RETRIEVE_DEPTH, "fields": []}
            reply = _ask(f"{address.rstrip('/')}/v1/search", body)
            run[query.id] = _ranked([result["id"] for result in reply.get("results", ())])
            advance()
    return run


def _ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    tries = 0
    while True:
        tries += 1
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code == REFUSED:
                return {}
            if error.code not in BUSY or tries == MAX_TRIES:
                told = error.read().decode(errors="replace")[:300]
                raise InputError(f"{url} answered {error.code}: {told}") from None
            time.sleep(float(error.headers.get("Retry-After", 1)))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{url} does not answer ({error}): start python -m serve.main with this bundle"
            ) from None


def _ranked(ids: Sequence[str]) -> dict[str, float]:
    return {document: float(-rank) for rank, document in enumerate(ids)}
