"""The shape lattice: which padded shapes exist, and how items of any length are split over them.

A compiled program has one shape, so lengths are padded up to a bucket. Few buckets mean few programs, many
buckets mean little padding; `Buckets.fit` chooses the lengths, `ItemLattice.plan` the batches. No JAX here;
the programs are made in `scoring.prefill`.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from jaxsearch.errors import InputError

LAUNCH_TOKENS = 48
"""What starting one batch costs, in tokens: reading every weight once. SmolLM2-135M on 2 CPU cores: 30-60."""


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Ascending padded sizes of one axis."""

    sizes: tuple[int, ...]

    def __init__(self, sizes: Iterable[int]) -> None:
        ordered = tuple(sorted(set(sizes)))
        if not ordered or ordered[0] < 1:
            raise InputError(f"bucket sizes must be positive and at least one; got {ordered}")
        object.__setattr__(self, "sizes", ordered)

    @property
    def largest(self) -> int:
        return self.sizes[-1]

    def bucket_of(self, size: int) -> int:
        """The smallest bucket that holds `size`; InputError when none does."""
        place = bisect.bisect_left(self.sizes, size)
        if place == len(self.sizes):
            raise InputError(
                f"{size} tokens do not fit: the largest bucket holds {self.largest}; shorten the text"
            )
        return self.sizes[place]

    @classmethod
    def geometric(cls, smallest: int, largest: int, *, growth: float = 1.5, multiple: int = 8) -> "Buckets":
        """Sizes that grow by `growth`, each a multiple of `multiple`, ending at `largest` rounded up to it.

        Padding of one length is then at most about `growth` - 1 of it.

        >>> Buckets.geometric(32, 128).sizes
        (32, 48, 72, 112, 128)
        """
        sizes = []
        size = float(smallest)
        top = round_up(largest, multiple)
        while size < top:
            sizes.append(min(round_up(int(size), multiple), top))
            size = max(size * growth, size + multiple)
        return cls([*sizes, top])

    @classmethod
    def fit(cls, lengths: Iterable[int], *, count: int, largest: int, multiple: int = 8) -> "Buckets":
        """At most `count` sizes with the least total padding over `lengths`; `largest` is always one of them.

        Args:
          lengths: a recorded length distribution, in tokens; those above `largest` count as `largest`.
          count: how many sizes, at least 1.
          largest: what must fit, rounded up to `multiple`.
        Returns: sizes that are multiples of `multiple`.

        >>> Buckets.fit([10, 10, 10, 60], count=2, largest=64).sizes
        (16, 64)
        """
        top = round_up(largest, multiple)
        weights: dict[int, int] = {top: 0}
        for length in lengths:
            size = min(round_up(max(length, 1), multiple), top)
            weights[size] = weights.get(size, 0) + 1
        sizes = sorted(weights)
        cumulative = [0, *itertools.accumulate(weights[size] for size in sizes)]
        # best[j]: (padded tokens, chosen) of covering the first j sizes, sizes[j - 1] the last one chosen
        best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
        best += [(size * cumulative[j + 1], (size,)) for j, size in enumerate(sizes)]
        for _ in range(count - 1):
            best = [best[0]] + [
                min(
                    (best[i][0] + sizes[j] * (cumulative[j + 1] - cumulative[i]), (*best[i][1], sizes[j]))
                    for i in range(j + 1)
                )
                for j in range(len(sizes))
            ]
        return cls(best[-1][1])


@dataclasses.dataclass(frozen=True)
class ItemBatch:
    """Items that run together: `positions` in the caller's list, padded to `count` rows of `length`
    tokens."""

    positions: tuple[int, ...]
    count: int
    length: int

    @property
    def padded_tokens(self) -> int:
        return self.count * self.length


class ItemLattice:
    """Shapes (count, length) with count · length ≤ `max_batch_tokens`.

    Per length the counts are the powers of four and the most that fit, so that a rest of few items does not
    pay for a full batch.
    """

    def __init__(self, lengths: Buckets, *, max_batch_tokens: int) -> None:
        if max_batch_tokens < lengths.largest:
            raise InputError(
                f"max_batch_tokens is {max_batch_tokens}, an item may have {lengths.largest} tokens; raise it"
            )
        self.lengths = lengths
        self.counts = {length: _counts(max_batch_tokens // length) for length in lengths.sizes}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """All (count, length), as many as there are programs per prefix bucket."""
        return [(count, length) for length, counts in self.counts.items() for count in counts]

    def plan(self, lengths: Sequence[int]) -> list[ItemBatch]:
        """Splits items over batches with the fewest padded tokens plus launch cost; longest items first.

        Optimal among partitions of the items sorted by length. InputError when one is empty or too long.
        """
        if any(length < 1 for length in lengths):
            raise InputError("an item without tokens cannot be scored; give it text")
        order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
        cost = [0] * (len(order) + 1)
        choice = [(0, 0)] * len(order)
        for start in reversed(range(len(order))):
            length = self.lengths.bucket_of(lengths[order[start]])
            cost[start], count = min(
                (LAUNCH_TOKENS + count * length + cost[min(start + count, len(order))], count)
                for count in self.counts[length]
            )
            choice[start] = (count, length)
        batches = []
        start = 0
        while start < len(order):
            count, length = choice[start]
            batches.append(ItemBatch(tuple(order[start : start + count]), count, length))
            start += count
        return batches


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def _counts(most: int) -> tuple[int, ...]:
    counts = [1]
    while counts[-1] * 4 < most:
        counts.append(counts[-1] * 4)
    return tuple(sorted({*counts, most}))
