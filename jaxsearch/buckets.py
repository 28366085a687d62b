"""The shape lattice: which padded sizes exist.

A compiled program has one shape, so sizes are padded up to a bucket. Few buckets mean few programs, many buckets mean
little padding. No JAX here; the programs are made in `scoring.prefill`, launches are filled in `scoring.packing`.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from jaxsearch.errors import InputError

LAUNCH_MULTIPLE, LAUNCH_GROWTH = 128, 1.125
"""A launch is at most an eighth larger than the one before it, or by one multiple where that is more."""
SMALLEST_WINDOW = 128
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""What `jax.monitoring` calls a compilation: once all shapes have their programs, none may come."""


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
class Lattice:
    """Every shape that scoring compiles: a launch is one row of tokens, and its size alone makes a program.

    Args:
      launches: sizes in tokens, multiples of `LAUNCH_MULTIPLE`.
      max_prefix_tokens, max_item_tokens: of a prompt; the widest windows of attention hold them.
    Raises: InputError when the longest prompt does not fit the largest launch.
    """

    launches: Buckets
    max_prefix_tokens: int
    max_item_tokens: int

    def __post_init__(self) -> None:
        if wrong := [size for size in self.launches.sizes if size % LAUNCH_MULTIPLE]:
            raise InputError(f"launches must be multiples of {LAUNCH_MULTIPLE} tokens; got {wrong}")
        if self.launches.largest < self.max_prefix_tokens + self.max_item_tokens:
            raise InputError(
                f"a prompt may have {self.max_prefix_tokens} + {self.max_item_tokens} tokens, the largest launch "
                f"holds {self.launches.largest}; raise max_batch_tokens"
            )

    @classmethod
    def for_prompts(
        cls, *, max_prefix_tokens: int, max_item_tokens: int, max_batch_tokens: int = 2048
    ) -> "Lattice":
        """Sizes that grow by about `LAUNCH_GROWTH` up to `max_batch_tokens`, or to the longest prompt if that is more.

        >>> Lattice.for_prompts(max_prefix_tokens=64, max_item_tokens=64, max_batch_tokens=512).launches.sizes
        (128, 256, 384, 512)
        """
        largest = max(max_batch_tokens, max_prefix_tokens + max_item_tokens)
        sizes = [LAUNCH_MULTIPLE]
        while sizes[-1] < largest:
            grown = int(sizes[-1] * LAUNCH_GROWTH) // LAUNCH_MULTIPLE * LAUNCH_MULTIPLE
            sizes.append(min(max(grown, sizes[-1] + LAUNCH_MULTIPLE), round_up(largest, LAUNCH_MULTIPLE)))
        return cls(Buckets(sizes), max_prefix_tokens, max_item_tokens)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Lattice":
        """What `to_json` wrote. Raises: InputError when keys are missing or the numbers do not fit together."""
        try:
            numbers = [int(value[name]) for name in ("max_prefix_tokens", "max_item_tokens")]
            return cls(Buckets(int(size) for size in value["launches"]), *numbers)
        except KeyError as error:
            wrong = f"{error.args[0]} is missing"
        except InputError as error:
            wrong = str(error)
        except (TypeError, ValueError):
            wrong = "launches must be a list of whole numbers, the others whole numbers"
        raise InputError(f"no lattice of launch sizes: {wrong}; export or plan it again")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"launches": list(self.launches.sizes)}

    @property
    def max_batch_tokens(self) -> int:
        return self.launches.largest

    def own_windows(self, block_tokens: int) -> Buckets:
        """How many keys of its own text, or texts, a block of queries may read: up to the longest text before it."""
        longest = max(self.max_prefix_tokens, self.max_item_tokens) + block_tokens - 1
        return Buckets.geometric(min(SMALLEST_WINDOW, longest), longest, multiple=64)

    def prefix_windows(self) -> Buckets:
        """How many keys of its prefix a block may read."""
        return Buckets.geometric(64, max(self.max_prefix_tokens, 1), growth=2.0, multiple=64)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple
