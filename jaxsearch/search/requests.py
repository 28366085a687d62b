"""What a search is asked, how it is planned, and what it answers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxsearch.errors import InputError
from jaxsearch.search.candidates import RETRIEVE_DEPTH, Candidates, Source
from jaxsearch.search.orders import Order, head_of


@dataclasses.dataclass(frozen=True)
class SearchRequest:
    """One question to a bundle, and how it is to be answered.

    Attributes:
      query: its text.
      top_k: results, at most.
      filter: see `filters`; None: every document.
      order: one of the bundle's orders; empty: the bundle's default, or what `sources` and `rank_depth` imply.
      sources: where candidates come from; None: from all that the order reads.
      retrieve_depth: candidates of each source.
      rank_depth: candidates that the ranker scores; None: as the bundle says; 0: no ranker.
      facets: fields whose values are counted among the candidates.
      fields: document fields to return; None: all.
      explain: say of each result which source found it, at which rank, with which score.
    """

    query: str
    top_k: int = 10
    filter: Mapping[str, Any] | None = None
    order: str = ""
    sources: Sequence[str] | None = None
    retrieve_depth: int = RETRIEVE_DEPTH
    rank_depth: int | None = None
    facets: Sequence[str] = ()
    fields: Sequence[str] | None = None
    explain: bool = False


class PlanError(InputError):
    """A request that cannot be answered as it asks; `field` of `SearchRequest` is what to change."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a request is answered: its order, the order that picks what the ranker scores, sources and depths."""

    order: Order
    first: Order
    sources: tuple[Source, ...]
    retrieve_depth: int
    rank_depth: int

    def cut(self, found: Candidates) -> Candidates:
        """The best of the first stage among what the sources found, as many as the depth of retrieval."""
        return found.at(np.sort(head_of(found, self.first, self.retrieve_depth)))

    def to_rank(self, candidates: Candidates) -> list[int]:
        """Positions of the documents that the ranker scores, in the order of the first stage."""
        return candidates.positions[head_of(candidates, self.first, self.rank_depth)].tolist()


@dataclasses.dataclass
class SearchResult:
    """One document.

    `score` is the calibrated probability that it is relevant; without a calibration the ranker's own probability or the
    order's raw score; None below the ranking depth. `scores["relevance"]["raw"]` is what sorts.
    """

    id: str
    rank: int
    score: float | None
    scores: dict[str, dict[str, float | None]]
    fields: dict[str, Any]
    matched: list[str]
    truncated: bool
    explain: dict[str, Any] | None = None


@dataclasses.dataclass
class SearchReply:
    """Results, best first, and what happened on the way.

    `total` counts the candidates; `starved` says that fewer documents pass the filter than were asked for.
    """

    results: list[SearchResult]
    order: str
    facets: dict[str, list[dict[str, Any]]]
    total: int
    depth_used: dict[str, int]
    starved: bool
