"""The stages of a search as functions, and `Searcher.search`, which runs them one after another in this process.

A server runs the same functions and puts its queue between them: `plan` and `passing` check the request, `nearest`
and the scorer are the device's work, `find`, `prompt` and `shape` the host's.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit

from jaxsearch.data.prompts import PromptTokens
from jaxsearch.data.records import Document
from jaxsearch.data.verticals import Vertical
from jaxsearch.encoder import TextEncoder
from jaxsearch.errors import InputError
from jaxsearch.ranker import TextRanker
from jaxsearch.retrieval.exact import ExactIndex
from jaxsearch.retrieval.fusion import RANK_CONSTANT
from jaxsearch.retrieval.lexical import Bm25Index
from jaxsearch.scoring.prefill import PrefillScorer, ScoreRequest
from jaxsearch.search.candidates import SIGNAL_OF, SOURCES, Candidates, Source, find_candidates
from jaxsearch.search.filters import Columns
from jaxsearch.search.orders import Order, Orders, arrange
from jaxsearch.search.requests import Plan, PlanError, SearchReply, SearchRequest, SearchResult

QUERIES_AT_ONCE = 64
ALONE: Mapping[Source, str] = {"embedding": "encoder", "bm25": "bm25"}
"""The order of a source on its own."""


class Searcher:
    """A corpus with its indexes and models, ready to be searched.

    Args:
      documents: the corpus, in the order of `index`.
      index: embeddings of the documents by `encoder`.
      bm25: words of the documents; None: `search` refuses orders that need them, `find_all` has embeddings alone.
      orders: see `orders`.
      ranker: of the orders that use one; None: those orders are refused.
      make_scorer: gives the ranker's scorer for `rank`, at its first use.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        vertical: Vertical,
        *,
        encoder: TextEncoder,
        index: ExactIndex,
        bm25: Bm25Index | None,
        orders: Orders,
        ranker: TextRanker | None = None,
        make_scorer: Callable[[], PrefillScorer] | None = None,
    ) -> None:
        self.documents = documents
        self.vertical = vertical
        self.encoder = encoder
        self.index = index
        self.bm25 = bm25
        self.orders = orders
        self.ranker = ranker
        self._make_scorer = make_scorer
        self._items: dict[int, tuple[list[int], bool]] = {}

    @functools.cached_property
    def columns(self) -> Columns:
        """The fields that filters and facets read."""
        return Columns(self.documents)

    @functools.cached_property
    def scorer(self) -> PrefillScorer:
        assert self._make_scorer is not None, "a searcher that ranks needs make_scorer"
        return self._make_scorer()

    def search(self, request: SearchRequest) -> SearchReply:
        """Answers a request. Raises: InputError for what it has wrong."""
        self.check_fields(request)
        plan = self.plan(request)
        passing = self.passing(request)
        [found] = self.find_all([request.query], plan.retrieve_depth, passing, sources=plan.sources)
        candidates = plan.cut(found)
        scores = np.zeros(0, np.float32)
        if positions := plan.to_rank(candidates):
            [scores] = self.rank([self.prompt(request.query, positions)])
        reply = self.shape(request, plan, candidates, passing, scores)
        return dataclasses.replace(reply, results=reply.results[: request.top_k])

    def check_fields(self, request: SearchRequest) -> None:
        """Raises: InputError for a field of `facets` or `fields` that no document has."""
        for where, names in (("facets", request.facets), ("fields", request.fields or ())):
            for name in names:
                self.columns.column(name, where=where)

    def plan(self, request: SearchRequest) -> Plan:
        """Resolves order, sources and depths.

        Raises: PlanError for an unknown order or source, an order that does not go with the sources or the depth, or
        a number that is too small.
        """
        for name, value, least in (
            ("top_k", request.top_k, 1),
            ("retrieve_depth", request.retrieve_depth, 1),
            ("rank_depth", request.rank_depth or 0, 0),
        ):
            if value < least:
                raise PlanError(name, f"{name} must be at least {least}, not {value}")
        if isinstance(request.sources, str):
            raise PlanError("sources", f"sources must be a list, [{request.sources!r}]")
        if request.sources is not None and not request.sources:
            raise PlanError(
                "sources", f"sources is empty; give some of {', '.join(SOURCES)}, or leave it out"
            )
        if wrong := sorted(set(request.sources or ()) - set(SOURCES)):
            raise PlanError("sources", f"unknown source {wrong[0]!r}; sources are {', '.join(SOURCES)}")
        order = self._order(request)
        wanted = request.sources or order.sources
        sources: tuple[Source, ...] = tuple(source for source in SOURCES if source in wanted)
        if missing := [s for s in SOURCES if SIGNAL_OF[s] in order.weights and s not in sources]:
            told = f"order {order.name!r} reads {' and '.join(missing)}, which sources leave out"
            raise PlanError("order", told)
        if "bm25" in sources and self.bm25 is None:
            raise PlanError("sources", "there is no BM25 index here; search by embedding alone")
        retrieve_depth = min(request.retrieve_depth, len(self.documents))
        if not order.uses_ranker:
            if request.rank_depth:
                told = f"order {order.name!r} uses no ranker: leave the rank depth out, or set 0"
                raise PlanError("rank_depth", told)
            return Plan(order, order, sources, retrieve_depth, 0)
        if self.ranker is None:
            raise PlanError("order", f"order {order.name!r} needs a ranker, and there is none")
        rank_depth = self.orders.rank_depth if request.rank_depth is None else request.rank_depth
        if not rank_depth:
            raise PlanError("rank_depth", f"order {order.name!r} needs a rank depth of 1 or more, not 0")
        first = self.orders.first_stage if sources == SOURCES else self.orders[ALONE[sources[0]]]
        return Plan(order, first, sources, retrieve_depth, min(rank_depth, retrieve_depth))

    def _order(self, request: SearchRequest) -> Order:
        """The order that is named, or that sources and depth imply."""
        if request.order:
            try:
                return self.orders[request.order]
            except InputError as error:
                raise PlanError("order", str(error)) from None
        if request.sources is not None and len(set(request.sources)) == 1:
            alone = next(ALONE[source] for source in SOURCES if source in request.sources)
            return self.orders["ranker" if request.rank_depth else alone]
        if request.rank_depth is None:
            return self.orders[self.orders.default]
        return self.orders.ranked if request.rank_depth else self.orders.retrieval

    def passing(self, request: SearchRequest) -> Bool[np.ndarray, "n"] | None:
        """The documents that pass the filter; None without one. Raises: InputError for a wrong filter."""
        return None if request.filter is None else self.columns.where(request.filter)

    def nearest(
        self, query_embed: Float[np.ndarray, "e"], k: int, passing: Bool[np.ndarray, "n"] | None
    ) -> Int[np.ndarray, "k"]:
        """Positions of the k nearest documents that pass, best first; -1 where there are fewer."""
        return self.index.search(query_embed[None], k, passing).positions[0]

    def find(
        self,
        query: str,
        plan: Plan,
        passing: Bool[np.ndarray, "n"] | None,
        query_embed: Float[np.ndarray, "e"] | None,
        nearest: Int[np.ndarray, "k"],
    ) -> Candidates:
        """Joins what the sources find and keeps the best of the first stage, as many as the plan's depth.

        Args: `nearest` may hold more than the depth.
        """
        return plan.cut(self._join(query, plan.retrieve_depth, passing, plan.sources, query_embed, nearest))

    def find_all(
        self,
        queries: Sequence[str],
        depth: int,
        passing: Bool[np.ndarray, "n"] | None = None,
        *,
        sources: Sequence[Source] = SOURCES,
    ) -> Iterator[Candidates]:
        """What the sources find for each query, `depth` documents each; many queries are embedded at once."""
        depth = min(depth, len(self.documents))
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            part = queries[start : start + QUERIES_AT_ONCE]
            if "embedding" not in sources:
                yield from (self._join(query, depth, passing, sources) for query in part)
                continue
            embeds = self.encoder.embed_queries(part)
            hits = self.index.search(embeds, depth, passing)
            for query, embed, nearest in zip(part, embeds, hits.positions, strict=True):
                yield self._join(query, depth, passing, sources, embed, nearest)

    def _join(
        self,
        query: str,
        depth: int,
        passing: Bool[np.ndarray, "n"] | None,
        sources: Sequence[Source],
        query_embed: Float[np.ndarray, "e"] | None = None,
        nearest: Int[np.ndarray, "k"] | Sequence[int] = (),
    ) -> Candidates:
        return find_candidates(
            query,
            depth=depth,
            filter_where=passing,
            bm25=self.bm25 if "bm25" in sources else None,
            index=self.index,
            query_embed=query_embed,
            nearest=nearest,
        )

    def prompt(self, query: str, positions: Sequence[int]) -> PromptTokens:
        """The ranker's prompt; a document is tokenised once, ever. Raises: InputError when the query is too long."""
        assert self.ranker is not None
        new = [position for position in positions if position not in self._items]
        texts = [self.vertical.document_text(self.documents[position], self.ranker.view) for position in new]
        prompt = self.ranker.request(query, texts)
        for position, item, is_cut in zip(new, prompt.items, prompt.truncated, strict=True):
            self._items[position] = (item, is_cut)
        items = [self._items[position] for position in positions]
        return dataclasses.replace(
            prompt, items=[item for item, _ in items], truncated=[is_cut for _, is_cut in items]
        )

    def rank(self, prompts: Sequence[PromptTokens]) -> list[Float[np.ndarray, "ranked"]]:
        """The ranker's scores, yes minus no, of each prompt's items, computed here and now."""
        assert self.ranker is not None
        requests = [ScoreRequest(prompt.prefix, prompt.items) for prompt in prompts]
        return [self.ranker.scores(logits) for logits in self.scorer.score(requests)]

    def shape(
        self,
        request: SearchRequest,
        plan: Plan,
        candidates: Candidates,
        passing: Bool[np.ndarray, "n"] | None,
        ranker_scores: Float[np.ndarray, "ranked"],
    ) -> SearchReply:
        """All candidates as results, best first; `ranker_scores` belong to the documents of `Plan.to_rank`."""
        places, scores = arrange(candidates, plan.order, plan.first, ranker_scores)
        calibrated = np.full(len(scores), np.nan)
        if plan.order.calibration is not None:
            calibrated = plan.order.calibration(scores)
        read = dict(zip(plan.to_rank(candidates), ranker_scores.tolist(), strict=True))
        explanations = self._explanations(plan, candidates, read) if request.explain else None
        results = []
        for rank, place in enumerate(places.tolist(), start=1):
            position, raw = int(candidates.positions[place]), float(scores[rank - 1])
            document, known = self.documents[position], _or_none(float(calibrated[rank - 1]))
            results.append(
                SearchResult(
                    id=document.id,
                    rank=rank,
                    score=_uncalibrated(plan.order, raw) if known is None else known,
                    scores={} if np.isnan(raw) else {"relevance": {"raw": raw, "calibrated": known}},
                    fields={
                        name: value
                        for name, value in document.fields.items()
                        if request.fields is None or name in request.fields
                    },
                    matched=sorted(source for source, ranks in candidates.ranks.items() if ranks[place]),
                    truncated=position in read and self._items[position][1],
                    explain=None if explanations is None else explanations[place],
                )
            )
        positions = candidates.positions.tolist()
        return SearchReply(
            results=results,
            order=plan.order.name,
            facets={
                name: self.columns.column(name, where="facets").counts(positions) for name in request.facets
            },
            total=len(results),
            depth_used={"retrieve": len(candidates), "rank": len(read)},
            starved=passing is not None and int(passing.sum()) < plan.retrieve_depth,
        )

    def _explanations(
        self, plan: Plan, candidates: Candidates, read: Mapping[int, float]
    ) -> list[dict[str, Any]]:
        """By candidate, rank and score in each source, all signals, the place in the first stage, the tokens read."""
        first_scores = plan.first.scores(candidates)
        first_rank = np.empty(len(candidates), np.int64)
        first_rank[np.argsort(-first_scores, kind="stable")] = np.arange(1, len(candidates) + 1)
        explanations = []
        for place, position in enumerate(candidates.positions.tolist()):
            signals = {name: float(values[place]) for name, values in candidates.signals.items()}
            found = {source: int(ranks[place]) for source, ranks in candidates.ranks.items() if ranks[place]}
            explanations.append(
                {
                    "sources": {
                        source: {
                            "rank": rank,
                            "score": signals[SIGNAL_OF[source]],
                            "fusion_term": 1.0 / (RANK_CONSTANT + rank),
                        }
                        for source, rank in found.items()
                    },
                    "signals": signals | {"ranker": read.get(position)},
                    "fused": {
                        "order": plan.first.name,
                        "rank": int(first_rank[place]),
                        "score": float(first_scores[place]),
                    },
                    "tokens": len(self._items[position][0]) if position in read else None,
                }
            )
        return explanations


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def _uncalibrated(order: Order, raw: float) -> float | None:
    """The score that is told where there is no calibration: the ranker alone gives a probability of its own."""
    return _or_none(float(expit(raw)) if tuple(order.weights) == ("ranker",) else raw)
