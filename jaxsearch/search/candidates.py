"""Candidates of a query: the documents that the first stage finds, each with its signals from every source."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsearch.retrieval import NO_DOCUMENT
from jaxsearch.retrieval.exact import ExactIndex
from jaxsearch.retrieval.lexical import Bm25Index, best_of

Source = Literal["embedding", "bm25"]
SOURCES: tuple[Source, ...] = ("embedding", "bm25")
RETRIEVE_DEPTH = 100
"""Candidates of a query, unless a request asks for another number."""
SIGNAL_OF: Mapping[str, str] = {"embedding": "similarity", "bm25": "bm25"}
"""The signal that each source gives."""


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The documents that at least one source found, in the order of the corpus.

    Attributes:
      positions: places of the documents in the corpus, ascending.
      signals: by name, one number per document, known even where its source did not find the document. `similarity`
        is the index's score of the pair. `bm25` is the BM25 score over the highest that any document has for the
        query, in [0, 1].
      ranks: by source, the document's rank from 1; 0 where the source did not find it.
    """

    positions: Int[np.ndarray, "c"]
    signals: Mapping[str, Float[np.ndarray, "c"]]
    ranks: Mapping[str, Int[np.ndarray, "c"]]

    def __len__(self) -> int:
        return len(self.positions)

    def found_by(self, sources: Sequence[Source]) -> "Candidates":
        """Those that one of these sources found."""
        ranks = [self.ranks[source] for source in sources if source in self.ranks]
        is_found = np.logical_or.reduce([np.zeros(len(self), bool), *(own > 0 for own in ranks)])
        return self.at(np.flatnonzero(is_found))

    def at(self, places: Int[np.ndarray, "c"]) -> "Candidates":
        """The candidates at these places, in this order."""
        return Candidates(
            self.positions[places],
            {name: values[places] for name, values in self.signals.items()},
            {name: values[places] for name, values in self.ranks.items()},
        )


def find_candidates(
    query: str,
    *,
    depth: int,
    filter_where: Bool[np.ndarray, "n"] | None = None,
    bm25: Bm25Index | None = None,
    index: ExactIndex | None = None,
    query_embed: Float[np.ndarray, "e"] | None = None,
    nearest: Sequence[int] | Int[np.ndarray, "k"] = (),
) -> Candidates:
    """Joins what words and embeddings find for a query.

    Args:
      depth: documents that each source gives, at most.
      filter_where: the documents that may be found. Signals do not depend on it.
      bm25: searched where given.
      index, query_embed, nearest: of the embedding source, where used; `nearest` are positions, best first, of the
        device's search under the same filter.
    """
    found: dict[str, np.ndarray] = {}
    lexical = None
    if query_embed is not None:
        found["embedding"] = np.asarray(nearest, np.int64)[:depth]
    if bm25 is not None:
        lexical = bm25.scores(query)
        found["bm25"] = best_of(lexical, depth, filter_where)
    positions = np.unique(np.concatenate([np.zeros(0, np.int64), *found.values()]))
    positions = positions[positions != NO_DOCUMENT]
    signals: dict[str, np.ndarray] = {}
    if index is not None and query_embed is not None:
        signals["similarity"] = index.similarity(query_embed, positions)
    if lexical is not None:
        highest = float(lexical.max(initial=0.0))
        signals["bm25"] = lexical[positions].astype(np.float64) / (highest if highest > 0 else 1.0)
    ranks = {}
    for source, ids in found.items():
        ranks[source] = np.zeros(len(positions), np.int64)
        kept = ids[ids != NO_DOCUMENT]
        ranks[source][np.searchsorted(positions, kept)] = np.arange(1, len(kept) + 1)
    return Candidates(positions, signals, ranks)
