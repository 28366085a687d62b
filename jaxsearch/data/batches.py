"""Examples to batches: padding, fixed shapes, sampled lists, and iterators that can start at any step.

A batch is a pure function of its step number, so a resumed run sees the data that it would have seen. `step_batches`
runs that function in memory or behind grain's prefetching threads. Next: `train.loop`.
"""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int

from jaxsearch.data.records import NUM_GRADES, Collection, Run
from jaxsearch.errors import InputError

ITEMS_PER_ROW = 4
"""Texts in a packed row: more of them fill rows more evenly, and compute more attention that the mask throws away.
Padding of the demo's batches: 12 and 9 % (encoder, ranker) with 3, 8 and 8 % with 4."""
MOST_PER_GROUP = 8
"""Queries whose candidates are packed together, at most: each computes attention to all prefixes of its group."""
Batch = TypeVar("Batch")


def pad_tokens(
    rows: Sequence[Sequence[int]], *, pad_id: int, lengths: Sequence[int]
) -> tuple[Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """Right-pads rows to the smallest of `lengths` that holds the longest row; longer rows are cut at the largest.

    Returns: tokens and where (True = a real token).
    Example:
        >>> tokens, where = pad_tokens([[5, 6, 7], [8]], pad_id=0, lengths=(2, 4))
        >>> tokens.tolist(), where.sum().item()
        ([[5, 6, 7, 0], [8, 0, 0, 0]], 4)
    """
    longest = max((len(row) for row in rows), default=1)
    length = lengths[min(bisect.bisect_left(lengths, longest), len(lengths) - 1)]
    tokens = np.full((len(rows), length), pad_id, np.int32)
    where = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        cut = min(len(row), length)
        tokens[i, :cut] = row[:cut]
        where[i, :cut] = True
    return tokens, where


def pack_tokens(
    lists: Sequence[Sequence[Sequence[int]]], *, rows: int, pad_id: int, lengths: Sequence[int]
) -> tuple[Int[np.ndarray, "b w t"], Int[np.ndarray, "b w t"], Int[np.ndarray, "b m"]]:
    """Puts each list's items one after another into `rows` rows, the longest first, each into the emptiest row.

    A row may hold any number of items; items without tokens take no place.

    Returns: tokens; segment_ids, 1 for a list's first item and so on, 0 for padding; and `ends`, the places of
        the items' last tokens in the list's rows put end to end (0 for an item without tokens).
    Raises: InputError when a row is longer than the longest of `lengths`.
    Example:
        >>> tokens, segment_ids, ends = pack_tokens([[[5], [6, 7, 8], [9, 4]]], rows=2, pad_id=0, lengths=(2, 4))
        >>> tokens.tolist(), segment_ids.tolist(), ends.tolist()
        ([[[6, 7, 8, 0], [9, 4, 5, 0]]], [[[2, 2, 2, 0], [3, 3, 1, 0]]], [[6, 2, 5]])
    """
    packed = [_pack([len(item) for item in items], rows) for items in lists]
    longest = max(filled for _, filled in packed)
    if longest > lengths[-1]:
        raise InputError(f"{longest} tokens do not fit into a row of {lengths[-1]}")
    length = lengths[bisect.bisect_left(lengths, longest)]
    tokens = np.full((len(lists), rows, length), pad_id, np.int32)
    segment_ids = np.zeros(tokens.shape, np.int32)
    ends = np.zeros((len(lists), len(lists[0])), np.int32)
    for i, (items, (places, _)) in enumerate(zip(lists, packed, strict=True)):
        for j, (item, (row, start)) in enumerate(zip(items, places, strict=True)):
            stop = start + len(item)
            tokens[i, row, start:stop] = item
            segment_ids[i, row, start:stop] = j + 1
            ends[i, j] = row * length + stop - 1 if len(item) else 0
    return tokens, segment_ids, ends


def pack_rows(
    lists: Sequence[Sequence[Sequence[int]]], *, pad_id: int, step: int, longest: int, pieces: int = 1
) -> tuple[Int[np.ndarray, "b w t"], Int[np.ndarray, "b w t"], Int[np.ndarray, "b m"]]:
    """`pack_tokens` with about `ITEMS_PER_ROW` items a row, its lengths those of `row_lengths`.

    Args: no item has more than `longest` tokens; `pieces` divides the rows of a list.
    """
    rows = -(-len(lists[0]) // ITEMS_PER_ROW)
    return pack_tokens(
        lists,
        rows=-(-rows // pieces) * pieces,
        pad_id=pad_id,
        lengths=row_lengths(step, (ITEMS_PER_ROW + 1) * longest),
    )


def _pack(sizes: Sequence[int], rows: int) -> tuple[list[tuple[int, int]], int]:
    """Row and start of each item, and how far the fullest row is filled."""
    filled, places = [0] * rows, [(0, 0)] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        row = filled.index(min(filled))
        places[item] = row, filled[row]
        filled[row] += sizes[item]
    return places, max(filled)


def row_lengths(step: int, maximum: int) -> tuple[int, ...]:
    """Padded lengths up to `maximum`, `step` apart, or a sixteenth where that is more: few programs for long rows.

    Example:
        >>> row_lengths(16, 64)
        (16, 32, 48, 64)
        >>> row_lengths(16, 700)[-4:]
        (608, 640, 672, 700)
    """
    lengths = [min(step, maximum)]
    while lengths[-1] < maximum:
        further = max(1, lengths[-1] // (16 * step)) * step
        lengths.append(min(lengths[-1] + further, maximum))
    return tuple(lengths)


def shuffled(size: int, batch_size: int, step: int, *, seed: int) -> Int[np.ndarray, "b"]:
    """Indices of batch `step` in an endless stream of epochs, each a new permutation of `range(size)`.

    Batches run across epoch borders, so every index is drawn equally often.
    Example:
        >>> drawn = [i for step in range(3) for i in shuffled(6, 2, step, seed=0).tolist()]
        >>> sorted(drawn)
        [0, 1, 2, 3, 4, 5]
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // size
    order = {epoch: np.random.default_rng((seed, epoch)).permutation(size) for epoch in np.unique(epochs)}
    return np.array(
        [order[epoch][position % size] for epoch, position in zip(epochs, positions, strict=True)]
    )


def packing_groups(size: int, pieces: int, *, most: int = MOST_PER_GROUP) -> int:
    """Into how many equal groups `size` queries are cut, so that `pieces` divides the groups and none has over `most`.

    Raises: InputError when `pieces` does not divide `size`.
    Example:
        >>> packing_groups(4, 1), packing_groups(32, 2), packing_groups(8, 8)
        (1, 4, 8)
    """
    if size % pieces:
        raise InputError(
            f"a batch of {size} cannot be cut into {pieces}: make it a multiple of optimizer.accumulate x the devices "
            "that share it (loop.mesh.data x loop.mesh.fsdp)"
        )
    return next(
        groups for groups in range(pieces, size + 1, pieces) if size % groups == 0 and size // groups <= most
    )


def step_batches(
    make_batch: Callable[[int], Batch], *, provider: str = "memory", prefetch: int = 4
) -> Callable[[int], Iterator[Batch]]:
    """Turns `make_batch(step)` into `batches(start_step)`, an endless iterator for the training loop.

    Args: `provider` "memory" builds each batch when asked; "grain" builds `prefetch` ahead on its own threads.
    """
    if provider not in {"memory", "grain"}:
        raise InputError(f"unknown data provider {provider!r}: choose 'memory' or 'grain'")

    def in_memory(start_step: int) -> Iterator[Batch]:
        step = start_step
        while True:
            yield make_batch(step)
            step += 1

    def with_grain(start_step: int) -> Iterator[Batch]:
        import grain

        dataset = grain.MapDataset.range(start_step, 2**31 - 1).map(make_batch)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        yield from dataset.to_iter_dataset(options)

    return with_grain if provider == "grain" else in_memory


class CandidateSampler:
    """Draws documents for a query: positives, and negatives from buckets by grade.

    The pool of a query is every graded document, the `mined` ones (a retriever's best, hard negatives) and, as easy
    negatives, any other document. Unseen documents are never drawn.
    """

    def __init__(self, collection: Collection, *, threshold: int, mined: Run | None = None):
        self.threshold = threshold
        self.documents = [key for key in collection.documents if key not in collection.unseen_documents]
        seen = set(self.documents)
        self._grades: dict[str, dict[str, int]] = {}
        self._mined: dict[str, list[str]] = {}
        for query_id in collection.queries:
            self._grades[query_id] = {
                key: grade for key, grade in collection.qrels.get(query_id, {}).items() if key in seen
            }
            ranked = sorted((mined or {}).get(query_id, {}).items(), key=lambda pair: (-pair[1], pair[0]))
            self._mined[query_id] = [key for key, _ in ranked if key in seen]

    def grade(self, query_id: str, document_id: str) -> int:
        return self._grades[query_id].get(document_id, 0)

    def is_relevant(self, query_id: str, document_id: str) -> bool:
        return self.grade(query_id, document_id) >= self.threshold

    def positives(self, query_id: str) -> list[str]:
        return [key for key, grade in self._grades[query_id].items() if grade >= self.threshold]

    def buckets(self, query_id: str) -> dict[str, list[str]]:
        """Negatives by kind: "graded" (judged below the threshold), "mined" (hard, without a grade)."""
        graded = [key for key, grade in self._grades[query_id].items() if grade < self.threshold]
        mined = [key for key in self._mined[query_id] if key not in self._grades[query_id]]
        return {"graded": graded, "mined": mined}

    def negatives(
        self, query_id: str, count: int, rng: np.random.Generator, *, random_share: float = 0.0
    ) -> list[str]:
        """`count` documents below the threshold: graded and mined buckets in turn, then random ones.

        Args: `random_share` of them, and at least one, are random.
        """
        num_hard = count - max(1, round(random_share * count))
        buckets = [list(rng.permutation(keys)) for keys in self.buckets(query_id).values() if keys]
        drawn: list[str] = []
        while len(drawn) < num_hard and any(buckets):
            for bucket in buckets:
                if bucket and len(drawn) < num_hard:
                    drawn.append(str(bucket.pop()))
        for place in rng.integers(len(self.documents), size=8 * count):
            if len(drawn) == count:
                break
            self._add(drawn, query_id, self.documents[place])
        for place in rng.permutation(len(self.documents)) if len(drawn) < count else ():
            if len(drawn) == count:
                break
            self._add(drawn, query_id, self.documents[place])
        if len(drawn) < count:
            raise InputError(
                f"query {query_id} has {len(drawn)} documents that are not relevant, {count} are asked for: ask for "
                "fewer documents a query, or add documents"
            )
        return drawn

    def _add(self, drawn: list[str], query_id: str, document_id: str) -> None:
        if not self.is_relevant(query_id, document_id) and document_id not in drawn:
            drawn.append(document_id)

    def pairs(
        self, query_id: str, count: int, rng: np.random.Generator, *, random_share: float = 0.0
    ) -> list[str]:
        """`count` different documents of all grades: up to half positives, spread over grades, the rest negatives.

        Args: `random_share` is that of the negatives.
        """
        by_grade: dict[int, list[str]] = {grade: [] for grade in range(self.threshold, NUM_GRADES)}
        for key in rng.permutation(np.array(self.positives(query_id), dtype=object)):
            by_grade[self.grade(query_id, key)].append(str(key))
        drawn: list[str] = []
        while len(drawn) < (count + 1) // 2 and any(by_grade.values()):
            for keys in by_grade.values():
                if keys and len(drawn) < (count + 1) // 2:
                    drawn.append(keys.pop())
        return drawn + self.negatives(query_id, count - len(drawn), rng, random_share=random_share)


def allowed_in_batch(
    sampler: CandidateSampler, query_ids: Sequence[str], document_ids: Sequence[Sequence[str]]
) -> Bool[np.ndarray, "q n"]:
    """Which in-batch documents may stand in query i's softmax: its positive, and no other relevant or equal document.

    Args: `document_ids[i]` are query i's own documents, its positive first; n counts them flattened, in order.
    """
    flat = [key for keys in document_ids for key in keys]
    width = len(document_ids[0])
    allowed = np.zeros((len(query_ids), len(flat)), bool)
    for i, query_id in enumerate(query_ids):
        seen: set[str] = {document_ids[i][0]}
        allowed[i, i * width] = True
        own_first = [
            *range(i * width + 1, (i + 1) * width),
            *range(i * width),
            *range((i + 1) * width, len(flat)),
        ]
        for j in own_first:
            if flat[j] not in seen and not sampler.is_relevant(query_id, flat[j]):
                allowed[i, j] = True
                seen.add(flat[j])
    return allowed


def group_pairs(pairs: Sequence[tuple[str, str]]) -> Mapping[str, list[str]]:
    """{query id: its document ids, in order, each once}."""
    grouped: dict[str, dict[str, None]] = {}
    for query_id, document_id in pairs:
        grouped.setdefault(query_id, {})[document_id] = None
    return {query_id: list(documents) for query_id, documents in grouped.items()}
