"""BM25 over words: the baseline every learned system has to beat, behind the interface of the vector indexes.

Lower-cased words of two letters or more, English stop words dropped, suffixes cut by `stem`. A document that
shares no word with the query is not found at all.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxsearch.errors import InputError
from jaxsearch.retrieval import NO_DOCUMENT, Hits, check_documents, check_request, read_index, write_index

_ENDINGS = ("ing", "ies", "es", "ed", "s")


def stem(word: str) -> str:
    """The word without the first of ing, ies, es, ed, s that it ends in, if three letters or more are left.

    Crude, but without it BM25 is a weaker baseline than it should be: NDCG@10 (exponential gain, count capped
    at 3, all queries) of O*NET activities .377 / .180 without and .386 / .195 with it, on the full and the
    short view.

    >>> [stem(word) for word in ("engines", "repairing", "bus", "disputes")]
    ['engin', 'repair', 'bus', 'disput']
    """
    for ending in _ENDINGS:
        if word.endswith(ending):
            return word.removesuffix(ending) if len(word) - len(ending) >= 3 else word
    return word


def best_of(
    scores: Float[np.ndarray, "n"], k: int, filter_where: Shaped[np.ndarray, "n"] | None = None
) -> Int[np.ndarray, "k"]:
    """Positions of the k highest of `Bm25Index.scores` that are above 0 and pass the filter, best first."""
    is_kept = scores > 0 if filter_where is None else (scores > 0) & filter_where
    found = np.flatnonzero(is_kept)
    return found[np.argsort(-scores[found], kind="stable")[:k]]


def _library() -> ModuleType:
    try:
        import bm25s
    except ImportError:
        raise InputError("BM25 needs bm25s: pip install 'jaxsearch[search]'") from None
    return bm25s


class Bm25Index:
    """BM25 (bm25s, Lucene's variant) over one text per document.

    Args:
      texts: the documents' texts.
      ids: one id per text, unique.
      k1: saturation of term frequency, >= 0.
      b: normalisation by length, in [0, 1].
      metadata: kept in the folder with the index.

    Raises:
      InputError: ids that repeat or do not match the texts; no text holds a word.

    Source: Robertson, Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009; Kamphuis et
    al., "Which BM25 Do You Mean?", 2020, for the variant.
    """

    kind = "bm25"

    def __init__(
        self,
        texts: Sequence[str],
        ids: Sequence[str],
        *,
        k1: float = 1.5,
        b: float = 0.75,
        metadata: Mapping[str, Any] | None = None,
    ):
        bm25s = _library()
        self.ids = check_documents(ids, len(texts))
        self.metadata = dict(metadata or {})
        self._settings = {"k1": k1, "b": b}
        tokens = self._words(texts)
        if not any(tokens):
            raise InputError("no document holds a word to index; check the view's fields")
        logging.getLogger("bm25s").setLevel(
            logging.WARNING
        )  # it logs its progress at DEBUG whatever the root says
        self._model = bm25s.BM25(k1=k1, b=b)
        self._model.index(tokens, show_progress=False)

    @staticmethod
    def _words(texts: Sequence[str]) -> list[list[str]]:
        tokens = _library().tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)
        return [[stem(str(word)) for word in words] for words in tokens]

    def search(
        self,
        queries: Sequence[str],
        k: int,
        filter_where: Shaped[np.ndarray, "n"] | Shaped[np.ndarray, "q n"] | None = None,
    ) -> Hits:
        """The best k documents of each query text that share a word with it.

        Args, Raises: as `ExactIndex.search`, with texts for embeddings.
        """
        check_request(len(queries), k, len(self.ids), filter_where)
        result = Hits(
            np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), NO_DOCUMENT, np.int32)
        )
        for query, text in enumerate(queries):
            scores = self.scores(text)
            own = filter_where if filter_where is None or filter_where.ndim == 1 else filter_where[query]
            best = best_of(scores, k, own)
            result.scores[query, : len(best)] = scores[best]
            result.positions[query, : len(best)] = best
        return result

    def scores(self, query: str) -> Float[np.ndarray, "n"]:
        """The float32 score of every document; 0 where it shares no word with the query."""
        known = [word for word in self._words([query])[0] if word in self._model.vocab_dict]
        if not known:
            return np.zeros(len(self.ids), np.float32)
        return np.asarray(self._model.get_scores(known), np.float32)

    def save(self, directory: str | Path) -> None:
        """Writes a folder of .npy and JSON files."""

        def write_files(folder: Path) -> None:
            self._model.save(str(folder / "bm25"), show_progress=False)

        write_index(directory, self.kind, self.ids, self._settings, self.metadata, write_files)

    @classmethod
    def load(cls, directory: str | Path) -> "Bm25Index":
        """Reads a saved folder. Raises: InputError as `ExactIndex.load`."""
        index = cls.__new__(cls)
        index.ids, index._settings, index.metadata = read_index(directory, cls.kind)
        try:
            index._model = _library().BM25.load(str(Path(directory) / "bm25"))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise InputError(f"{directory} is damaged ({error}); build the index again") from None
        return index
