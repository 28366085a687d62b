"""Exhaustive top-k on the device: retrieval as ranking, S(q, d) = w0 * <q, d> + sum_i wi * f_i(d).

Every document is scored for every query, filters apply exactly, and the result is the true top k. Documents
lie sharded over the devices of a mesh; each device scans its own in chunks, so that no more than [queries,
chunk] scores exist at a time, and only its best k travel. Approximate search for corpora beyond device
memory: `scann`.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxsearch.errors import InputError
from jaxsearch.retrieval import (
    NO_DOCUMENT,
    Hits,
    check_documents,
    check_request,
    load_array,
    pad_hits,
    read_index,
    write_index,
)

FilterKind = Literal["shared", "per_query"]
_SCORE_BYTES = 4


def _top_k(
    scores: Float[Array, "q s"], positions: Int[Array, "q s"], k: int
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """Best k columns; among equal scores the earlier column, hence the earlier document."""
    best, columns = jax.lax.top_k(scores, k)
    return best, jnp.take_along_axis(positions, columns, axis=1)


def _search_shard(
    embeds: Float[Array, "n e"],
    bias: Float[Array, "n"],
    query_embeds: Float[Array, "q e"],
    filter_where: Bool[Array, "m n"],
    *,
    k: int,
    chunk_size: int,
    axes: tuple[str, ...],
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """Top k of one device's documents, then of all devices' winners; the mask has one row or q rows."""
    num_queries, num_local = query_embeds.shape[0], embeds.shape[0]
    num_chunks = num_local // chunk_size
    first = jax.lax.axis_index(axes) * num_local

    def scan_chunk(best, chunk):
        start = chunk * chunk_size
        documents = jax.lax.dynamic_slice_in_dim(embeds, start, chunk_size)
        scores = jnp.einsum(
            "qe,ne->qn",
            query_embeds,
            documents,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        scores = scores + jax.lax.dynamic_slice_in_dim(bias, start, chunk_size)[None, :]
        allowed = jax.lax.dynamic_slice_in_dim(filter_where, start, chunk_size, axis=1)
        scores = jnp.where(allowed, scores, -jnp.inf)
        positions = jnp.broadcast_to(first + start + jnp.arange(chunk_size, dtype=jnp.int32), scores.shape)
        merged = jnp.concatenate([best[0], scores], axis=1), jnp.concatenate([best[1], positions], axis=1)
        return _top_k(*merged, k), None

    nothing = (
        jnp.full((num_queries, k), -jnp.inf, jnp.float32),
        jnp.full((num_queries, k), NO_DOCUMENT, jnp.int32),
    )
    best, _ = jax.lax.scan(scan_chunk, nothing, jnp.arange(num_chunks, dtype=jnp.int32))
    # [devices q k] -> [q devices*k], devices in the order of their documents, so ties stay in document order
    scores, positions = (
        jnp.moveaxis(jax.lax.all_gather(part, axes), 0, 1).reshape(num_queries, -1) for part in best
    )
    scores, positions = _top_k(scores, positions, k)
    return scores, jnp.where(jnp.isneginf(scores), NO_DOCUMENT, positions)


class ExactIndex:
    """All documents' embeddings on the device, searched exhaustively.

    Args:
      embeds: [n e], finite; usually of unit length.
      ids: one id per row, unique; kept on the host.
      features: [n i] query-independent features (popularity, freshness, ...), or None.
      weights: w0 for the product of the embeddings, then one per feature; None is 1 for the product and needs
        features to be None.
      mesh: devices over which the documents are split (all axes of the mesh); None takes the first device.
      dtype: storage type on the device; scores are accumulated in float32 and, for float32, multiplied at
        highest precision.
      max_queries: queries per program; longer lists are searched in parts.
      memory_budget_bytes: bound on one device's [queries, chunk] scores, which sets the chunk.
      metadata: kept in the folder with the index, for example the version of the encoder.

    Raises:
      InputError: shapes that do not fit, ids that repeat, numbers that are not finite.
    """

    kind = "exact"

    def __init__(
        self,
        embeds: Float[np.ndarray, "n e"],
        ids: Sequence[str],
        *,
        features: Float[np.ndarray, "n i"] | None = None,
        weights: Sequence[float] | None = None,
        mesh: Mesh | None = None,
        dtype: Any = jnp.float32,
        max_queries: int = 64,
        memory_budget_bytes: int = 256 * 2**20,
        metadata: Mapping[str, Any] | None = None,
    ):
        self.ids = check_documents(ids, len(embeds))
        self.metadata = dict(metadata or {})
        self.max_queries = max_queries
        self._features = np.zeros((len(embeds), 0), np.float32) if features is None else np.asarray(features)
        self._weights = tuple(float(weight) for weight in ((1.0,) if weights is None else weights))
        if self._features.shape[0] != len(embeds) or len(self._weights) != 1 + self._features.shape[1]:
            raise InputError(
                f"{len(self._weights)} weights and features of shape {self._features.shape} do not fit "
                f"{len(embeds)} documents: give one weight for the embeddings and one per feature"
            )
        if not (np.isfinite(embeds).all() and np.isfinite(self._features).all()):
            raise InputError("embeddings and features must be finite; the encoder that made them is broken")
        self._embeds = np.asarray(embeds)
        self._dtype = dtype
        self._mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",)) if mesh is None else mesh
        self._programs: dict[tuple[int, int, FilterKind], jax.stages.Compiled] = {}
        self._place(memory_budget_bytes)

    @property
    def embed_dim(self) -> int:
        return self._embeds.shape[1]

    @property
    def chunk_size(self) -> int:
        """Documents that one device scores at a time."""
        return self._chunk_size

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far; constant once `compile` has seen the sizes that are asked for."""
        return len(self._programs)

    def _place(self, memory_budget_bytes: int) -> None:
        num_devices = self._mesh.size
        per_device = -(-len(self.ids) // num_devices)
        self._chunk_size = max(1, min(per_device, memory_budget_bytes // (_SCORE_BYTES * self.max_queries)))
        local = -(-per_device // self._chunk_size) * self._chunk_size
        self._num_rows = local * num_devices
        axes = self._mesh.axis_names
        padding = self._num_rows - len(self.ids)
        scaled = np.pad(self._embeds, ((0, padding), (0, 0)))
        bias = np.pad(self._features @ np.array(self._weights[1:], np.float32), (0, padding))
        self._device_embeds = jax.device_put(
            scaled.astype(self._dtype), NamedSharding(self._mesh, P(axes, None))
        )
        self._device_bias = jax.device_put(bias.astype(np.float32), NamedSharding(self._mesh, P(axes)))
        self._query_sharding = NamedSharding(self._mesh, P(None, None))
        self._mask_sharding = NamedSharding(self._mesh, P(None, axes))
        self._everything = jax.device_put(
            np.pad(np.ones((1, len(self.ids)), bool), ((0, 0), (0, padding))), self._mask_sharding
        )

    def _program(self, num_queries: int, k: int, filter_kind: FilterKind) -> jax.stages.Compiled:
        key = (num_queries, k, filter_kind)
        if key not in self._programs:
            axes = self._mesh.axis_names
            search = functools.partial(_search_shard, k=k, chunk_size=self._chunk_size, axes=axes)
            sharded = jax.shard_map(
                search,
                mesh=self._mesh,
                in_specs=(P(axes, None), P(axes), P(None, None), P(None, axes)),
                out_specs=P(None, None),
                check_vma=False,
            )
            mask_rows = 1 if filter_kind == "shared" else num_queries
            self._programs[key] = (
                jax.jit(sharded)
                .lower(
                    self._device_embeds,
                    self._device_bias,
                    jax.ShapeDtypeStruct(
                        (num_queries, self.embed_dim), self._dtype, sharding=self._query_sharding
                    ),
                    jax.ShapeDtypeStruct((mask_rows, self._num_rows), np.bool_, sharding=self._mask_sharding),
                )
                .compile()
            )
        return self._programs[key]

    def _bucket_of_queries(self, num_queries: int) -> int:
        return min(self.max_queries, 1 << (num_queries - 1).bit_length())

    def _bucket_of_k(self, k: int) -> int:
        """The smallest compiled k that serves this one (a top k begins every longer one), else k rounded up."""
        k = min(k, len(self.ids))
        compiled = [known for _, known, _ in self._programs if known >= k]
        return min(compiled) if compiled else min(len(self.ids), max(16, 1 << (k - 1).bit_length()))

    def compile(self, max_queries: int, k: int) -> int:
        """Compiles ahead for 1..max_queries queries at a time, up to k results, with or without filters.

        Returns:
          The number of programs held; a search within these sizes adds none.

        Raises:
          InputError: more queries than the index was built for.
        """
        if not 1 <= max_queries <= self.max_queries:
            raise InputError(f"max_queries must be in 1..{self.max_queries}, as the index was built for")
        check_request(max_queries, k, len(self.ids), None)
        k, bucket, buckets = min(k, len(self.ids)), 1, set()
        while bucket < max_queries:
            buckets.add(self._bucket_of_queries(bucket))
            bucket *= 2
        for size in sorted(buckets | {self._bucket_of_queries(max_queries)}):
            self._program(size, k, "shared")
            self._program(size, k, "per_query")
        return self.num_compilations

    def search(
        self,
        queries: Float[np.ndarray, "q e"],
        k: int,
        filter_where: Shaped[np.ndarray, "n"] | Shaped[np.ndarray, "q n"] | None = None,
    ) -> Hits:
        """The exact best k documents of each query among those whose mask is True.

        Args:
          queries: [q e] embeddings made by the documents' encoder.
          k: results per query; more than there are documents leaves empty places.
          filter_where: boolean, [n] for all queries, [q n] for each its own, or None.

        Returns:
          Hits [q k]: scores are float32 within 2e-6 of float64 for unit vectors
          (`test_retrieval.py::test_exact_equals_float64`).

        Raises:
          InputError: a wrong width, k below 1, a mask of another shape or type.
        """
        queries = np.asarray(queries)
        if queries.ndim != 2 or queries.shape[1] != self.embed_dim:
            raise InputError(f"queries must have shape [q {self.embed_dim}], got {list(queries.shape)}")
        check_request(len(queries), k, len(self.ids), filter_where)
        if not len(queries):
            return Hits(np.zeros((0, k), np.float32), np.zeros((0, k), np.int32))
        parts = []
        for start in range(0, len(queries), self.max_queries):
            part = slice(start, start + self.max_queries)
            mask = filter_where[part] if filter_where is not None and filter_where.ndim == 2 else filter_where
            parts.append(self._search_part(queries[part], min(k, len(self.ids)), mask))
        hits = Hits(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        return pad_hits(hits, k)

    def _search_part(self, queries: np.ndarray, k: int, filter_where: np.ndarray | None) -> Hits:
        count, bucket = len(queries), self._bucket_of_queries(len(queries))
        padded = np.pad(queries * self._weights[0], ((0, bucket - count), (0, 0))).astype(self._dtype)
        kind: FilterKind = "shared" if filter_where is None or filter_where.ndim == 1 else "per_query"
        if filter_where is None:
            mask = self._everything
        else:
            rows = filter_where[None, :] if kind == "shared" else filter_where
            size = 1 if kind == "shared" else bucket
            rows = np.pad(rows, ((0, size - len(rows)), (0, self._num_rows - rows.shape[1])))
            mask = jax.device_put(rows, self._mask_sharding)
        program = self._program(bucket, self._bucket_of_k(k), kind)
        embeds = jax.device_put(padded, self._query_sharding)
        scores, positions = program(self._device_embeds, self._device_bias, embeds, mask)
        return Hits(np.asarray(scores)[:count, :k], np.asarray(positions)[:count, :k])

    def similarity(
        self, query: Float[np.ndarray, "e"], positions: Int[np.ndarray, "m"]
    ) -> Float[np.ndarray, "m"]:
        """S(q, d) of one query with chosen documents, float64, computed on the host from the stored embeddings."""
        weight, *others = self._weights
        products = self._embeds[positions].astype(np.float64) @ np.asarray(query, np.float64)
        return weight * products + self._features[positions] @ np.array(others, np.float64)

    def save(self, directory: str | Path) -> None:
        """Writes a folder without pickle: index.json, ids.json, embeds.npy, features.npy."""

        def write_files(folder: Path) -> None:
            np.save(folder / "embeds.npy", self._embeds, allow_pickle=False)
            np.save(folder / "features.npy", self._features, allow_pickle=False)

        write_index(directory, self.kind, self.ids, {"weights": self._weights}, self.metadata, write_files)

    @classmethod
    def load(cls, directory: str | Path, **options: Any) -> "ExactIndex":
        """Reads a saved folder; `options` are the constructor's mesh, dtype, max_queries,
        memory_budget_bytes.

        Raises:
          InputError: no index, another kind of index, damaged files.
        """
        ids, settings, metadata = read_index(directory, cls.kind)
        return cls(
            load_array(Path(directory) / "embeds.npy"),
            ids,
            features=load_array(Path(directory) / "features.npy"),
            weights=settings["weights"],
            metadata=metadata,
            **options,
        )
