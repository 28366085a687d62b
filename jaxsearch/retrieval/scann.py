"""Approximate search on the CPU with ScaNN, for corpora too large to scan.

ScaNN knows no filters: a filtered search fetches more than it needs, drops what does not pass, and may come
back with fewer than k documents. `jaxsearch.retrieval.starved` says for which queries that happened; `exact`
never starves.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from jaxsearch.errors import InputError
from jaxsearch.retrieval import (
    NO_DOCUMENT,
    Hits,
    check_documents,
    check_request,
    count_passing,
    load_array,
    read_index,
    write_index,
)

BRUTE_FORCE_BELOW = 1_000
TREE_FROM = 5_000


class ScannIndex:
    """ScaNN over the same embeddings and with the same interface as `ExactIndex`, scores being inner
    products.

    Args:
      embeds: [n e] float32, finite.
      ids: one id per row, unique.
      num_leaves: parts of the tree; None takes the square root of n from 5,000 documents on, below that there
        is no tree (0), and below 1,000 documents the scan is exhaustive.
      leaves_to_search: parts visited per query; None takes a tenth, at least 10.
      reorder: candidates whose score is computed again without quantisation, at least.
      over_fetch: how many times more than k / (share that passes) a filtered search fetches.
      max_fetch: bound on what one query fetches; the reason why a selective filter starves.
      metadata: kept in the folder with the index.

    Raises:
      InputError: shapes that do not fit, ids that repeat, numbers that are not finite.
    """

    kind = "scann"

    def __init__(
        self,
        embeds: Float[np.ndarray, "n e"],
        ids: Sequence[str],
        *,
        num_leaves: int | None = None,
        leaves_to_search: int | None = None,
        reorder: int = 200,
        over_fetch: float = 2.0,
        max_fetch: int = 2_000,
        metadata: Mapping[str, Any] | None = None,
    ):
        self.ids = check_documents(ids, len(embeds))
        if not np.isfinite(embeds).all():
            raise InputError("embeddings must be finite; the encoder that made them is broken")
        if over_fetch < 1:
            raise InputError(f"over_fetch must be at least 1, got {over_fetch}")
        if num_leaves is None:
            num_leaves = round(math.sqrt(len(self.ids))) if len(self.ids) >= TREE_FROM else 0
        self.metadata = dict(metadata or {})
        self._embeds = np.ascontiguousarray(embeds, np.float32)
        self._settings = {
            "num_leaves": num_leaves,
            "leaves_to_search": leaves_to_search or max(10, num_leaves // 10),
            "reorder": reorder,
            "over_fetch": over_fetch,
            "max_fetch": max_fetch,
        }
        self._searcher = self._build()

    @property
    def embed_dim(self) -> int:
        return self._embeds.shape[1]

    def _build(self) -> Any:
        from scann import scann_ops_pybind

        builder: Any = scann_ops_pybind.builder(self._embeds, min(10, len(self.ids)), "dot_product")
        if len(self.ids) < BRUTE_FORCE_BELOW:
            return builder.score_brute_force().build()
        leaves = self._settings["num_leaves"]
        if leaves:
            builder = builder.tree(
                num_leaves=leaves,
                num_leaves_to_search=self._settings["leaves_to_search"],
                training_sample_size=min(len(self.ids), 100_000),
            )
        quantised = builder.score_ah(2, anisotropic_quantization_threshold=0.2)
        return quantised.reorder(self._settings["reorder"]).build()

    def _num_fetched(self, k: int, filter_where: np.ndarray | None) -> int:
        if filter_where is None:
            return min(k, len(self.ids))
        fewest = max(1, int(count_passing(filter_where, len(self.ids)).min()))
        wanted = math.ceil(self._settings["over_fetch"] * k * len(self.ids) / fewest)
        return min(len(self.ids), max(k, min(wanted, self._settings["max_fetch"])))

    def search(
        self,
        queries: Float[np.ndarray, "q e"],
        k: int,
        filter_where: Shaped[np.ndarray, "n"] | Shaped[np.ndarray, "q n"] | None = None,
    ) -> Hits:
        """About the best k documents of each query; fewer where a filter starved the search (see `starved`).

        Args, Raises: as `ExactIndex.search`. Returned scores are exact inner products of what was found.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.embed_dim:
            raise InputError(f"queries must have shape [q {self.embed_dim}], got {list(queries.shape)}")
        check_request(len(queries), k, len(self.ids), filter_where)
        result = Hits(
            np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), NO_DOCUMENT, np.int32)
        )
        if not len(queries):
            return result
        fetched = self._num_fetched(k, filter_where)
        reorder = max(fetched, self._settings["reorder"])
        positions, scores = self._searcher.search_batched(
            queries, final_num_neighbors=fetched, pre_reorder_num_neighbors=reorder
        )
        for query, (found, values) in enumerate(zip(positions, scores, strict=True)):
            found, values = np.asarray(found, np.int64), np.asarray(values, np.float32)
            is_kept = np.isfinite(values)
            if filter_where is not None:
                is_kept &= filter_where[found] if filter_where.ndim == 1 else filter_where[query, found]
            found, values = found[is_kept], values[is_kept]
            order = np.lexsort((found, -values))[:k]
            result.scores[query, : len(order)] = values[order]
            result.positions[query, : len(order)] = found[order]
        return result

    def save(self, directory: str | Path) -> None:
        """Writes embeddings and settings; ScaNN's own structures are built again on loading, which needs no pickle."""
        write_index(
            directory,
            self.kind,
            self.ids,
            self._settings,
            self.metadata,
            lambda folder: np.save(folder / "embeds.npy", self._embeds, allow_pickle=False),
        )

    @classmethod
    def load(cls, directory: str | Path) -> "ScannIndex":
        """Reads a saved folder and trains the quantiser again. Raises: InputError as `ExactIndex.load`."""
        ids, settings, metadata = read_index(directory, cls.kind)
        return cls(load_array(Path(directory) / "embeds.npy"), ids, metadata=metadata, **settings)
