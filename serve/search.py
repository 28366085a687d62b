"""`/v1/search`: the library's stages of a search with the server's queue between them, their times, and cursors.

Only encoding, index search and ranking run on the device threads; what a stage does is `jaxsearch.search`'s.
"""

import asyncio
import collections
import dataclasses
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np

from jaxsearch.scoring.prefill import ScoreRequest
from jaxsearch.search.requests import Plan, PlanError, SearchRequest
from serve.batcher import DEFAULT_RETRY_SECONDS, LATE, DeadlineExceeded, Outcome, QueueFull
from serve.engine import Engine, Job, Scored
from serve.protocol import RequestError, SearchBody, blaming

MAX_CURSORS = 256
PARAMS = {
    "order": "order",
    "top_k": "top_k",
    "sources": "retrieve.sources",
    "retrieve_depth": "retrieve.depth",
    "rank_depth": "rank.depth",
}
"""By field of `SearchRequest`, where the body has it."""
RunJob = Callable[[Job], Awaitable[Outcome]]


@dataclasses.dataclass(frozen=True)
class _Pinned:
    """A ranked list that cursors page through."""

    query_digest: str
    reply: dict[str, Any]
    results: list[dict[str, Any]]


class SearchService:
    """Schedules searches over a bundle's corpus. Host work runs in `executor`."""

    def __init__(self, engine: Engine, executor: Executor, *, max_searches: int) -> None:
        self.engine = engine
        self.bundle = engine.bundle
        self.searcher = engine.bundle.searcher
        self._executor = executor
        self._mean_item_tokens = 0.0
        self._max_searches = max_searches
        self._num_searches = 0
        self._pinned: collections.OrderedDict[str, _Pinned] = collections.OrderedDict()

    def plan(self, body: SearchBody) -> Plan:
        """How the search will be answered. Raises: RequestError 400 or 404 for what cannot be served."""
        self._check(body)
        try:
            return self.searcher.plan(_request(body))
        except PlanError as error:
            code = "empty_input" if body.retrieve.sources == [] else "invalid_request"
            raise RequestError(400, str(error), code=code, param=PARAMS[error.field]) from None

    def expected_tokens(self, plan: Plan) -> int:
        """About what ranking will take, by the search ranked last: most of a search, known only at its end."""
        return int(plan.rank_depth * self._mean_item_tokens)

    async def search(
        self, body: SearchBody, plan: Plan, run: RunJob, deadline: float | None
    ) -> dict[str, Any]:
        """The reply to one search, answered by `plan`.

        Args: after `deadline`, on the monotonic clock, nobody waits for it.
        Raises: RequestError 400, 404 or 410, also for what the filter or the prompt refuses; QueueFull;
            DeadlineExceeded; and what `run` raises.
        """
        begun = time.perf_counter()
        if body.cursor is not None:
            return self._page(body, begun)
        if self._num_searches >= self._max_searches:
            raise QueueFull(f"{self._num_searches} searches are under way already", DEFAULT_RETRY_SECONDS)
        self._num_searches += 1
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                return await self._searched(body, plan, run, begun)
        except TimeoutError:
            raise DeadlineExceeded(LATE) from None
        finally:
            self._num_searches -= 1

    async def _searched(self, body: SearchBody, plan: Plan, run: RunJob, begun: float) -> dict[str, Any]:
        searcher = self.searcher
        stages: dict[str, float] = {}
        request = _request(body)
        with blaming("filter"):
            passing = await self._host(searcher.passing, request)
        for param, part in (("facets", {"fields": None}), ("fields", {"facets": ()})):
            with blaming(param):
                searcher.check_fields(dataclasses.replace(request, **part))
        query_embed = None
        nearest = np.zeros(0, np.int64)
        if "embedding" in plan.sources:
            outcome = await run(self.engine.retrieve_job(body.query, passing))
            query_embed, nearest, stages["retrieve"] = outcome.value
            stages["encode"] = outcome.compute_seconds - stages["retrieve"]
            stages["queue"] = outcome.queue_seconds
        mark = time.perf_counter()
        candidates = await self._host(searcher.find, body.query, plan, passing, query_embed, nearest)
        stages["fuse"] = time.perf_counter() - mark
        scored = None
        scores = np.zeros(0, np.float32)
        if positions := plan.to_rank(candidates):
            mark = time.perf_counter()
            job = await self._host(self._score_job, body.query, positions)
            stages["tokenize"] = time.perf_counter() - mark
            outcome = await run(job)
            scored = outcome.value
            scores = self.bundle.ranker.scores(scored.logits)
            stages["rank"] = outcome.compute_seconds
            stages["queue"] = stages.get("queue", 0.0) + outcome.queue_seconds
        found = await self._host(self._shaped, request, plan, candidates, passing, scores)
        results = found.pop("results")
        reply = found | self._about(scored)
        key = self._pin(body, reply, results)
        for stage, seconds in stages.items():
            self.engine.telemetry.stage_seconds.labels(stage).observe(seconds)
        stages["total"] = time.perf_counter() - begun
        timings = {stage: round(1000 * seconds, 3) for stage, seconds in stages.items()}
        return self._slice(reply, results, 0, body.top_k, key) | {"timings_ms": timings}

    async def _host(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def _shaped(self, request: SearchRequest, *arguments: Any) -> dict[str, Any]:
        """The library's reply as JSON values; results explain themselves where they were asked to."""
        reply = dataclasses.asdict(self.searcher.shape(request, *arguments))
        if not request.explain:
            for result in reply["results"]:
                del result["explain"]
        return reply

    def _about(self, scored: Scored | None) -> dict[str, Any]:
        return {
            "model_revision": self.bundle.revision,
            "index_revision": self.bundle.index_revision,
            "usage": scored.usage() if scored else {"prompt_tokens": 0, "total_tokens": 0},
        }

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

    def _score_job(self, query: str, positions: list[int]) -> Job:
        with blaming("query"):  # documents are cut, the query is not
            prompt = self.searcher.prompt(query, positions)
        self._mean_item_tokens = sum(map(len, prompt.items)) / len(prompt.items)
        return self.engine.score_job(ScoreRequest(prompt.prefix, prompt.items))

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


def _request(body: SearchBody) -> SearchRequest:
    return SearchRequest(
        body.query,
        top_k=body.top_k,
        filter=body.filter,
        order=body.order or "",
        sources=body.retrieve.sources,
        retrieve_depth=body.retrieve.depth,
        rank_depth=body.rank.depth,
        facets=body.facets,
        fields=body.fields,
        explain=body.explain,
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
