"""Fills launches: the prompts of many requests end to end in one row of tokens, and the arrays that say what they see.

A part of a request is its prefix followed by some of its items. All on the host; what runs is `scoring.prefill`'s, how
attention reads it is `nn.packed`'s.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from jaxsearch.buckets import LAUNCH_MULTIPLE, Lattice, round_up
from jaxsearch.nn.packed import BLOCK_TOKENS, PackedPrompts, PackedQueries

MAX_LABELS = 16
"""Label rows of every item: fewer labels are padded, so any set of label tokens runs without a new program."""
END_TOKENS = 16
"""A launch has room for one item in so many tokens."""
SPLIT_SHARE = 4
"""A part that leaves items for later, in a launch with others, has at least so many tokens of items to one of prefix:
the prefix is computed again."""


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """Items to score after one shared prefix.

    Args:
      prefix: tokens that all items share, at least one.
      items: tokens of each item, at least one each, ending right before the label token.
      label_token_ids: whose logits to return; None means the scorer's own.
    """

    prefix: tuple[int, ...]
    items: Sequence[Sequence[int]]
    label_token_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Items of one request, at `positions`, that run in one launch behind their prefix; `owner` is the caller's."""

    owner: int
    positions: Sequence[int]
    prefix: Sequence[int]
    items: Sequence[Sequence[int]]
    label_token_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prefix) + sum(map(len, self.items))


class Shapes:
    """What launches of a lattice look like on this backend.

    Args: `is_batch_invariant` gives every text the same place relative to its block, its window and the launch's end,
        and all launches one shape, so that a score does not depend on its neighbours, bit for bit. `is_blockwise` says
        that attention takes one block after another, whose scores stay in the cache, not all at once; None: on CPU.
    """

    def __init__(
        self, lattice: Lattice, *, is_batch_invariant: bool = False, is_blockwise: bool | None = None
    ) -> None:
        self.is_blockwise = jax.default_backend() == "cpu" if is_blockwise is None else is_blockwise
        self.lattice = lattice
        self.is_batch_invariant = is_batch_invariant
        self.own, self.shared = lattice.own_windows(BLOCK_TOKENS).sizes, lattice.prefix_windows().sizes
        self.launches = lattice.launches.sizes
        if is_batch_invariant:
            self.own, self.shared = self.own[-1:], self.shared[-1:]
            longest = round_up(lattice.max_prefix_tokens, BLOCK_TOKENS) + round_up(
                lattice.max_item_tokens, BLOCK_TOKENS
            )
            room = max(self.launches[-1], longest)
            self.launches = (round_up(room + self.tail, LAUNCH_MULTIPLE),)
        self.windows = tuple((own, shared) for shared in self.shared for own in self.own)

    @property
    def tail(self) -> int:
        """Tokens at a launch's end that stay free, so that no window has to begin earlier."""
        return max(self.own[-1], self.shared[-1]) if self.is_batch_invariant else 0

    @property
    def room(self) -> int:
        """Tokens that the largest launch holds."""
        return self.launches[-1] - self.tail

    def ends(self, size: int) -> int:
        """How many items a launch of `size` tokens may have."""
        return size // END_TOKENS

    def size_of(self, tokens: int) -> int:
        return next(size for size in self.launches if size >= tokens + self.tail)

    def aligned(self, tokens: int) -> int:
        """Room that a text takes: whole blocks where it must start at one."""
        return round_up(tokens, BLOCK_TOKENS) if self.is_batch_invariant else tokens

    def group_blocks(self, num_blocks: int) -> int:
        """How many blocks one product takes."""
        return 1 if self.is_blockwise else num_blocks

    def structure(self, size: int) -> PackedPrompts:
        """The shapes of a launch's arrays, in their places."""

        def queries(count: int, block: int) -> PackedQueries:
            blocks = count // block
            groups = blocks // self.group_blocks(blocks)
            shapes: list[Any] = [(count,)] * 3 + [(blocks,)] * 2 + [(groups,), ()]
            return PackedQueries(*shapes)

        shape: Any = (size,)
        return PackedPrompts(shape, shape, queries(size, BLOCK_TOKENS), queries(self.ends(size), 1))


class Launch:
    """Parts of requests, added as long as there is room."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.parts: list[Part] = []
        self._end = 0
        self._num_items = 0

    @property
    def num_tokens(self) -> int:
        """Prefix and item tokens, without padding."""
        return sum(part.num_tokens for part in self.parts)

    @property
    def filled(self) -> int:
        """The tokens that it must have room for: where many short items come, for all their ends."""
        return max(self._end, END_TOKENS * self._num_items)

    @property
    def padded_tokens(self) -> int:
        """The launch's size."""
        return self.shapes.size_of(self.filled)

    def add(self, owner: int, request: ScoreRequest, waiting: list[int]) -> int:
        """Takes what fits of the items at `waiting`, longest first, out of the list, and says how many it took.

        0 where it is better to wait for the next launch; one that is empty always takes some. Requests are those of
        `PrefillScorer.checked`, `waiting` is `longest_first` of their items.
        """
        shapes, prefix = self.shapes, request.prefix
        most = shapes.ends(shapes.launches[-1]) - self._num_items
        start = round_up(self._end, BLOCK_TOKENS)
        if (
            start + shapes.aligned(len(prefix)) + shapes.aligned(len(request.items[waiting[-1]]))
            > shapes.room
        ):
            return 0
        end, taken = start + shapes.aligned(len(prefix)), []
        for position in waiting:
            after = end + shapes.aligned(len(request.items[position]))
            if after <= shapes.room and len(taken) < most:
                end = after
                taken.append(position)
        is_rest = len(taken) == len(waiting)
        if not taken or (self.parts and not is_rest and end - start < (1 + SPLIT_SHARE) * len(prefix)):
            return 0
        gone = set(taken)
        waiting[:] = [position for position in waiting if position not in gone]
        items = [request.items[position] for position in taken]
        self._put(Part(owner, taken, prefix, items, request.label_token_ids or ()), end)
        return len(taken)

    def split(self) -> list["Launch"]:
        """Each part in a launch of its own."""
        launches = []
        for part in self.parts:
            launch = Launch(self.shapes)
            launch._put(part, sum(map(self.shapes.aligned, map(len, [part.prefix, *part.items]))))
            launches.append(launch)
        return launches

    def _put(self, part: Part, end: int) -> None:
        self.parts.append(part)
        self._num_items += len(part.items)
        self._end = end

    def arrays(self, *, base_tokens: int = 0) -> tuple[Int[np.ndarray, "ints"], Int[np.ndarray, "m labels"]]:
        """All of `Shapes.structure` as one vector, and each item's label tokens."""
        shapes, size = self.shapes, self.padded_tokens
        texts = _Texts(size, base_tokens)
        labels = np.zeros((shapes.ends(size), MAX_LABELS), np.int32)
        ends: list[int] = []
        filled = 0
        for part in self.parts:
            start = round_up(filled, BLOCK_TOKENS)
            texts.write(start, part.prefix, prefix=start, prefix_length=0)
            filled = start + shapes.aligned(len(part.prefix))
            for item in part.items:
                labels[len(ends), : len(part.label_token_ids)] = part.label_token_ids
                texts.write(filled, item, prefix=start, prefix_length=len(part.prefix))
                ends.append(filled + len(item) - 1)
                filled += shapes.aligned(len(item))
        at = np.array(ends + [size - 1] * (len(labels) - len(ends)), np.int32)
        everything = self._queries(texts, np.arange(size, dtype=np.int32), BLOCK_TOKENS, filled)
        some = self._queries(texts, at, 1, len(ends))
        prompts = PackedPrompts(texts.tokens, texts.positions, everything, some)  # pyright: ignore
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(prompts)]), labels

    def _queries(self, texts: "_Texts", places: np.ndarray, block: int, used: int) -> PackedQueries:
        starts, prefix_lengths = texts.starts[places], texts.prefix_lengths[places]
        block_starts = starts.reshape(-1, block).min(axis=1)
        last = places.reshape(-1, block).max(axis=1)
        group = self.shapes.group_blocks(len(block_starts))
        own = (last + 1 - block_starts).reshape(-1, group).max(axis=1)
        shared = prefix_lengths.reshape(-1, group * block).max(axis=1)
        windows = np.searchsorted(self.shapes.shared, shared) * len(self.shapes.own)
        windows += np.searchsorted(self.shapes.own, own)
        num_groups = -(-used // (group * block))
        prefixes = texts.prefixes[places].reshape(-1, block)[:, 0]
        found = (places, starts, prefix_lengths, block_starts, prefixes, windows, num_groups)
        return PackedQueries(*(np.asarray(each, np.int32) for each in found))  # pyright: ignore


def fill_launches(shapes: Shapes, requests: Iterable[ScoreRequest]) -> list[Launch]:
    """Launches with all items, filled in the order given; the `owner` of a part is its request's place in it.

    Requests are those of `PrefillScorer.checked`.
    """
    launches = [Launch(shapes)]
    for owner, request in enumerate(requests):
        waiting = longest_first(request.items)
        while waiting:
            if not launches[-1].add(owner, request, waiting):
                launches.append(Launch(shapes))
    return [launch for launch in launches if launch.parts]


def longest_first(items: Sequence[Sequence[int]]) -> list[int]:
    """Positions in the order in which launches take them: what is short fills what is left."""
    return sorted(range(len(items)), key=lambda position: -len(items[position]))


def unpack(ints: Int[Array, "ints"] | Int[np.ndarray, "ints"], structure: PackedPrompts) -> PackedPrompts:
    """The arrays of `Launch.arrays` again."""
    shapes, treedef = jax.tree.flatten(structure, is_leaf=lambda node: type(node) is tuple)
    leaves, start = [], 0
    for shape in shapes:
        end = start + math.prod(shape)
        leaves.append(ints[start:end].reshape(shape))
        start = end
    return jax.tree.unflatten(treedef, leaves)


class _Texts:
    """A launch's tokens with what holds for each of them; padding sees itself alone."""

    def __init__(self, size: int, base_tokens: int) -> None:
        self.base_tokens = base_tokens
        self.tokens, self.positions, self.prefixes, self.prefix_lengths = np.zeros((4, size), np.int32)
        self.starts = np.arange(size, dtype=np.int32)

    def write(self, at: int, tokens: Sequence[int], *, prefix: int, prefix_length: int) -> None:
        end = at + len(tokens)
        self.tokens[at:end] = tokens
        self.positions[at:end] = self.base_tokens + prefix_length + np.arange(len(tokens))
        self.starts[at:end] = at
        self.prefixes[at:end] = prefix
        self.prefix_lengths[at:end] = prefix_length
