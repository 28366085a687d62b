"""The first stage of a collection for launchers: the library's own search, so that training and validation see the
candidates that a server will rank."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxsearch.data.prompts import PromptTokens
from jaxsearch.data.records import Collection, Query, Run
from jaxsearch.data.verticals import Vertical
from jaxsearch.encoder import TextEncoder
from jaxsearch.errors import InputError
from jaxsearch.metrics import restrict
from jaxsearch.ranker import TextRanker
from jaxsearch.retrieval.exact import ExactIndex
from jaxsearch.retrieval.lexical import Bm25Index
from jaxsearch.scoring.prefill import PrefillScorer
from jaxsearch.search.candidates import RETRIEVE_DEPTH, Candidates
from jaxsearch.search.fitting import GradedCandidates, NothingToFitError, fit_sum
from jaxsearch.search.orders import UNFITTED, Order, Orders, head_of
from jaxsearch.search.searcher import Searcher
from train.options import progress, say

QUERIES_AT_ONCE = 4
TEXTS_AT_ONCE = 512
MOST_QUERIES = 500
"""Validation queries that the sum is fitted on, at most, drawn by a fixed seed."""


@dataclasses.dataclass(frozen=True)
class FirstStage:
    """A searcher over a collection and the order whose best candidates are ranked.

    Attributes:
      queries: the validation queries that the order was fitted on.
      unfitted: why nothing was fitted; empty where the order is the fitted sum.
    """

    collection: Collection
    threshold: int
    searcher: Searcher
    order: Order
    queries: Sequence[Query] = ()
    unfitted: str = ""

    def seen(self) -> np.ndarray:
        """A mask over the documents: those that training, mining and fitting may look at."""
        unseen = self.collection.unseen_documents
        return np.array([key not in unseen for key in self.searcher.index.ids])

    def candidates(self, queries: Sequence[Query]) -> dict[str, Candidates]:
        """By query id, the seen documents that the sources find."""
        return dict(self._found(queries, RETRIEVE_DEPTH, seen_only=True))

    def _found(
        self, queries: Sequence[Query], depth: int, *, seen_only: bool
    ) -> Iterator[tuple[str, Candidates]]:
        texts = [query.text for query in queries]
        found = self.searcher.find_all(texts, depth, self.seen() if seen_only else None)
        return zip((query.id for query in queries), found, strict=True)

    def graded(self, queries: Sequence[Query]) -> GradedCandidates:
        """Candidates of queries with the grades of their seen documents."""
        seen = restrict(
            self.collection.qrels_of(queries),
            self.collection.documents.keys() - self.collection.unseen_documents,
        )
        return GradedCandidates(self.candidates(queries), self.searcher.index.ids, seen, self.threshold)

    def mine(self, queries: Sequence[Query], *, depth: int, seen_only: bool = True) -> Run:
        """The best `depth` documents for each query by the first stage's order, with its scores.

        Args: `seen_only` leaves out the unseen documents, as every training use must.
        """
        mined: Run = {}
        wide = max(depth, RETRIEVE_DEPTH)
        for query_id, found in self._found(queries, wide, seen_only=seen_only):
            head = found.at(head_of(found, self.order, depth))
            keys = [self.searcher.index.ids[position] for position in head.positions.tolist()]
            mined[query_id] = dict(zip(keys, self.order.scores(head).tolist(), strict=True))
        return mined

    def rank(self, candidates: Mapping[str, Candidates], depth: int) -> dict[str, np.ndarray]:
        """By query id, the ranker's scores of the best `depth` candidates, in the order of the first stage.

        Queries that are too long for the ranker are left out, and their number is said.
        """
        scores: dict[str, np.ndarray] = {}
        heads = {
            query_id: found.positions[head_of(found, self.order, depth)].tolist()
            for query_id, found in candidates.items()
        }
        with progress("ranking validation queries", len(heads)) as advance:
            queries = [self.collection.queries[query_id] for query_id in heads]
            for start in range(0, len(queries), QUERIES_AT_ONCE):
                part = queries[start : start + QUERIES_AT_ONCE]
                scores |= rank_some(self.searcher, part, heads)
                advance(len(part))
        if num_refused := len(heads) - len(scores):
            say(f"{num_refused} validation queries are too long for the ranker and are left out")
        return scores


def rank_some(
    searcher: Searcher, queries: Sequence[Query], heads: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """By query id, the ranker's scores of the documents at `heads`' positions; without queries too long for it."""
    prompts: dict[str, PromptTokens] = {}
    for query in queries:
        with contextlib.suppress(InputError):  # too long: a server refuses it
            prompts[query.id] = searcher.prompt(query.text, heads[query.id])
    return dict(zip(prompts, searcher.rank(list(prompts.values())), strict=True))


def open_first_stage(
    collection: Collection,
    vertical: Vertical,
    encoder: TextEncoder,
    *,
    view: str,
    index: ExactIndex | None = None,
    ranker: TextRanker | None = None,
    make_scorer: Callable[[], PrefillScorer] | None = None,
) -> FirstStage:
    """Indexes a collection and fits the sum of similarity and BM25 on its validation queries and seen documents.

    Where nothing can be fitted the order is reciprocal rank fusion; where bm25s is not installed, similarity alone. A
    line says so.

    Args:
      view: which view of a document the encoder reads; words are those of the vertical's `lexical_view`.
      index: the documents' embeddings; None: made here.
    """
    documents = list(collection.documents.values())
    if index is None:
        texts = [vertical.document_text(document, view) for document in documents]
        index = ExactIndex(embed_corpus(encoder, texts), [document.id for document in documents])
    else:
        documents = [collection.documents[key] for key in index.ids]
    bm25 = None
    if importlib.util.find_spec("bm25s"):
        lexical_view = vertical.words_of(view)
        bm25 = Bm25Index([vertical.document_text(d, lexical_view) for d in documents], index.ids)
    searcher = Searcher(
        documents,
        vertical,
        encoder=encoder,
        index=index,
        bm25=bm25,
        orders=Orders.unfitted(),
        ranker=ranker,
        make_scorer=make_scorer,
    )
    unfitted = {order.name: order for order in UNFITTED}
    stage = FirstStage(collection, vertical.relevant_threshold, searcher, unfitted["rrf"])
    if bm25 is None:
        why = "bm25s is not installed, candidates are found by embeddings alone"
        say(why)
        return dataclasses.replace(stage, order=unfitted["encoder"], unfitted=why)
    queries, why = draw(collection.split("validation"), MOST_QUERIES, 0), ""
    if not queries:
        why = "there are no graded validation queries"
    else:
        try:
            return dataclasses.replace(stage, order=fit_sum(stage.graded(queries)), queries=queries)
        except NothingToFitError:
            why = "no validation query has a graded seen document"
    say(f"{why}: candidates are those of reciprocal rank fusion, nothing is fitted")
    return dataclasses.replace(stage, unfitted=why)


def embed_corpus(encoder: TextEncoder, texts: Sequence[str]) -> Float[np.ndarray, "c e"]:
    """Embeddings of documents, with a progress bar."""
    parts = [np.zeros((0, encoder.embed_dim), np.float32)]
    with progress("embedding documents", len(texts)) as advance:
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            parts.append(encoder.embed_documents(texts[start : start + TEXTS_AT_ONCE]))
            advance(len(parts[-1]))
    return np.concatenate(parts)


def draw(queries: Sequence[Query], count: int, seed: int) -> list[Query]:
    """`count` of the queries, fixed by the seed, in their own order; 0 or too many gives all."""
    if not 0 < count < len(queries):
        return list(queries)
    chosen = np.random.default_rng(seed).permutation(len(queries))[:count]
    return [queries[position] for position in sorted(chosen)]
