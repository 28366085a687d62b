"""`/v1/search`: encode, retrieve, fuse, rank, and say what happened on the way.

Retrieval gives candidates, from the embedding index, from BM25, or from both fused by reciprocal rank; the ranker
orders the best of them. Only encoding, index search and ranking run on the device threads.
"""

import asyncio
import collections
import dataclasses
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxsearch.retrieval import NO_DOCUMENT
from jaxsearch.retrieval.fusion import RANK_CONSTANT, reciprocal_rank_fusion
from jaxsearch.retrieval.lexical import Bm25Index
from jaxsearch.scoring.prefill import ScoreRequest
from serve.batcher import Outcome
from serve.engine import Engine, Job
from serve.filters import Columns
from serve.protocol import RequestError, SearchBody, blaming

MAX_CURSORS = 256
RunJob = Callable[[Job], Awaitable[Outcome]]


@dataclasses.dataclass
class Candidates:
    """Fused candidates, best first: corpus positions, fused scores, and each source's {position: (rank, score)}."""

    positions: list[int]
    fused: list[float]
    sources: dict[str, dict[int, tuple[int, float]]]


@dataclasses.dataclass(frozen=True)
class _Pinned:
    """A ranked list that cursors page through."""

    query_digest: str
    reply: dict[str, Any]
    results: list[dict[str, Any]]


class Searcher:
    """The search pipeline over a bundle's corpus. Host work runs in `executor`."""

    def __init__(self, engine: Engine, executor: Executor) -> None:
        self.engine = engine
        self.bundle = engine.bundle
        self._executor = executor
        self._columns = Columns(self.bundle.documents)
        texts = [
            self.bundle.vertical.document_text(document, self.bundle.lexical_view)
            for document in self.bundle.documents
        ]
        self._bm25 = Bm25Index(texts, [document.id for document in self.bundle.documents])
        self._items: dict[int, tuple[list[int], bool]] = {}
        self._mean_item_tokens = 0.0
        self._pinned: collections.OrderedDict[str, _Pinned] = collections.OrderedDict()

    @property
    def fields(self) -> list[str]:
        """Names that filters and facets know."""
        return self._columns.names

    @property
    def columns(self) -> list[dict[str, Any]]:
        """The same fields with their kinds and what they can be filtered by."""
        return self._columns.described

    def expected_tokens(self, body: SearchBody) -> int:
        """About what ranking will take, by the search ranked last: most of a search, known only at its end."""
        depth = min(body.rank.depth, body.retrieve.depth, len(self.bundle.documents))
        return int(depth * self._mean_item_tokens)

    async def search(self, body: SearchBody, run: RunJob) -> dict[str, Any]:
        """The reply to one search.

        Raises: RequestError 400, 404 or 410, also for what the filter or the prompt refuses; and what `run` raises.
        """
        begun = time.perf_counter()
        self._check(body)
        if body.cursor is not None:
            return self._page(body, begun)
        stages: dict[str, float] = {}
        with blaming("filter"):
            filter_where = await self._host(self._filter_where, body)
        for param, names in (("facets", body.facets), ("fields", body.fields or ())):
            with blaming(param):
                for name in names:
                    self._columns.column(name, where=param)
        vectors = None
        if "embedding" in body.retrieve.sources:
            outcome = await run(self.engine.retrieve_job(body.query, filter_where))
            vectors, stages["retrieve"] = outcome.value
            stages["encode"] = outcome.compute_seconds - stages["retrieve"]
            stages["queue"] = outcome.queue_seconds
        mark = time.perf_counter()
        candidates = await self._host(self._fuse, body, filter_where, vectors)
        stages["fuse"] = time.perf_counter() - mark
        depth = min(body.rank.depth, len(candidates.positions))
        scored, truncated = None, set[int]()
        if depth:
            mark = time.perf_counter()
            job, truncated = await self._host(self._score_job, body.query, candidates.positions[:depth])
            stages["tokenize"] = time.perf_counter() - mark
            outcome = await run(job)
            scored = outcome.value
            stages["rank"] = outcome.compute_seconds
            stages["queue"] = stages.get("queue", 0.0) + outcome.queue_seconds
        logits = None if scored is None else self.bundle.ranker.scores(scored.logits)
        results = self._results(body, candidates, logits, truncated)
        wanted = min(body.retrieve.depth, len(self.bundle.documents))
        reply = {
            "facets": {name: self._counts(name, candidates.positions) for name in body.facets},
            "total": len(results),
            "depth_used": {"retrieve": len(candidates.positions), "rank": depth},
            "starved": filter_where is not None and len(candidates.positions) < wanted,
            "model_revision": self.bundle.revision,
            "index_revision": self.bundle.index_revision,
            "usage": scored.usage() if scored else {"prompt_tokens": 0, "total_tokens": 0},
        }
        key = self._pin(body, reply, results)
        for stage, seconds in stages.items():
            self.engine.telemetry.stage_seconds.labels(stage).observe(seconds)
        stages["total"] = time.perf_counter() - begun
        timings = {stage: round(1000 * seconds, 3) for stage, seconds in stages.items()}
        return self._slice(reply, results, 0, body.top_k, key) | {"timings_ms": timings}

    async def _host(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def _check(self, body: SearchBody) -> None:
        known = self.bundle.vertical.name
        if body.vertical not in (None, known):
            message = f"unknown vertical {body.vertical!r}; this server has {known!r}"
            raise RequestError(404, message, code="unknown_index", param="vertical")
        if body.rank.variant != "ranker":
            message = f"unknown rank.variant {body.rank.variant!r}; this server has 'ranker'"
            raise RequestError(400, message, param="rank.variant")
        if set(body.rank.objective) != {"relevance"}:
            message = f"rank.objective {sorted(body.rank.objective)}: this server has 'relevance' only"
            raise RequestError(400, message, param="rank.objective")
        if not body.retrieve.sources:
            message = "retrieve.sources is empty; give 'embedding', 'bm25' or both"
            raise RequestError(400, message, code="empty_input", param="retrieve.sources")

    def _filter_where(self, body: SearchBody) -> Bool[np.ndarray, "c"] | None:
        return None if body.filter is None else self._columns.where(body.filter)

    def _fuse(
        self,
        body: SearchBody,
        filter_where: Bool[np.ndarray, "c"] | None,
        vectors: tuple[np.ndarray, np.ndarray] | None,
    ) -> Candidates:
        depth = min(body.retrieve.depth, len(self.bundle.documents))
        sources = {}
        if vectors is not None:
            sources["embedding"] = _ranked(*vectors, depth)
        if "bm25" in body.retrieve.sources:
            hits = self._bm25.search([body.query], depth, filter_where)
            is_found = hits.positions[0] != NO_DOCUMENT
            sources["bm25"] = _ranked(hits.scores[0][is_found], hits.positions[0][is_found], depth)
        runs = [{"": {str(p): score for p, (_, score) in found.items()}} for found in sources.values()]
        fused = {int(p): score for p, score in reciprocal_rank_fusion(runs)[""].items()}
        order = sorted(fused, key=lambda position: (-fused[position], position))[:depth]
        return Candidates(order, [fused[position] for position in order], sources)

    def _score_job(self, query: str, positions: Sequence[int]) -> tuple[Job, set[int]]:
        """The scoring job, and which positions had their text cut; a document is tokenised once, ever."""
        ranker = self.bundle.ranker
        new = [position for position in positions if position not in self._items]
        documents = self.bundle.documents
        texts = [self.bundle.vertical.document_text(documents[position], ranker.view) for position in new]
        with blaming("query"):  # documents are cut, the query is not
            prompt = ranker.request(query, texts)
        for position, item, is_cut in zip(new, prompt.items, prompt.truncated, strict=True):
            self._items[position] = (item, is_cut)
        items = [self._items[position][0] for position in positions]
        self._mean_item_tokens = sum(map(len, items)) / len(items)
        job = self.engine.score_job(ScoreRequest(prompt.prefix, items))
        return job, {p for p in positions if self._items[p][1]}

    def _results(
        self, body: SearchBody, candidates: Candidates, logits: np.ndarray | None, truncated: set[int]
    ) -> list[dict[str, Any]]:
        """Ranked candidates by score; those below the ranking depth follow in retrieval order, without a score."""
        depth = 0 if logits is None else len(logits)
        calibrated = None
        if logits is not None and self.bundle.calibration is not None:
            calibrated = self.bundle.calibration(logits)
        order = [*([] if logits is None else np.argsort(-logits, kind="stable").tolist())]
        order += range(depth, len(candidates.positions))
        results = []
        for rank, place in enumerate(order, start=1):
            position = candidates.positions[place]
            document = self.bundle.documents[position]
            found = {name: ranks[position] for name, ranks in candidates.sources.items() if position in ranks}
            result = {
                "id": document.id,
                "rank": rank,
                "score": None,
                "scores": {},
                "fields": {
                    name: value
                    for name, value in document.fields.items()
                    if body.fields is None or name in body.fields
                },
                "matched": sorted(found),
                "truncated": position in truncated,
            }
            if place < depth and logits is not None:
                raw = float(logits[place])
                known = None if calibrated is None else float(calibrated[place])
                result["score"] = float(sigmoid(logits[place])) if known is None else known
                result["scores"] = {"relevance": {"raw": raw, "calibrated": known}}
            elif not depth:
                result["score"] = candidates.fused[place]
            if body.explain:
                result["explain"] = {
                    "sources": {
                        name: {"rank": r, "score": s, "fusion_term": 1.0 / (RANK_CONSTANT + r)}
                        for name, (r, s) in found.items()
                    },
                    "fused": {"rank": place + 1, "score": candidates.fused[place]},
                    "tokens": len(self._items[position][0]) if place < depth else None,
                }
            results.append(result)
        return results

    def _counts(self, name: str, positions: Sequence[int]) -> list[dict[str, Any]]:
        return self._columns.column(name, where="facets").counts(positions)

    def _pin(self, body: SearchBody, reply: dict[str, Any], results: list[dict[str, Any]]) -> str:
        key = secrets.token_hex(8)
        self._pinned[key] = _Pinned(_digest(body.query), reply, results)
        while len(self._pinned) > MAX_CURSORS:
            self._pinned.popitem(last=False)
        return key

    def _page(self, body: SearchBody, begun: float) -> dict[str, Any]:
        """A later page of a list that was ranked before: nothing is computed again."""
        key, _, offset = (body.cursor or "").partition("-")
        if not offset.isdecimal() or len(offset) > 6:
            message = "cursor is not one that this server gave; leave it out to start again"
            raise RequestError(400, message, param="cursor")
        pinned = self._pinned.get(key)
        if pinned is None or pinned.query_digest != _digest(body.query):
            message = "the cursor's list is no longer kept, or belongs to another query; search without it"
            raise RequestError(410, message, code="cursor_gone", param="cursor")
        total = round(1000 * (time.perf_counter() - begun), 3)
        page = self._slice(pinned.reply, pinned.results, int(offset), body.top_k, key)
        return page | {"timings_ms": {"total": total}}

    @staticmethod
    def _slice(
        reply: dict[str, Any], results: list[dict[str, Any]], offset: int, top_k: int, key: str
    ) -> dict[str, Any]:
        end = offset + top_k
        return {
            "results": results[offset:end],
            "cursor": f"{key}-{end}" if end < len(results) else None,
            **reply,
        }


def _ranked(scores: np.ndarray, positions: np.ndarray, depth: int) -> dict[int, tuple[int, float]]:
    pairs = zip(positions[:depth].tolist(), scores[:depth].tolist(), strict=True)
    return {position: (rank, score) for rank, (position, score) in enumerate(pairs, start=1)}


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """p(yes) from l_yes - l_no."""
    return 0.5 * (1 + np.tanh(0.5 * logits))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
