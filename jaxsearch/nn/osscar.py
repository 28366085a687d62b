"""Which channels of a linear map to keep so that its output changes least, and what the kept rows become (OSSCAR).

Float64 NumPy on the statistics of one map: gram = XᵀX of its inputs X [tokens, channels], kernel = W [channels, out].
Channels go in groups of equal size: a neuron is one channel, an attention head all of its own. Removing what was kept
least dear, exchanging what that got wrong, and refitting W on what is left all lower one objective, `relative_error`.
Collecting the statistics and cutting models: `nn.pruning`.

Source: Meng et al., "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial
Optimization", arXiv 2403.12983, sections 3 and 4.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.linalg
from jaxtyping import Float, Float64, Int

from jaxsearch.errors import InputError

DAMPING = 1e-4
"""Added to the gram matrix's diagonal, as a share of its mean."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """Groups that stay, rising; the rows of the kernel for them; and the share of the output's energy that is lost."""

    groups: tuple[int, ...]
    kernel: Float64[np.ndarray, "kept out"]
    relative_error: float


def channels_of(groups: Iterable[int], size: int) -> Int[np.ndarray, "channels"]:
    """The channels of groups of `size`.

    Example:
        >>> channels_of([0, 2], 2).tolist()
        [0, 1, 4, 5]
    """
    return (np.asarray([*groups], np.int64)[:, None] * size + np.arange(size)).reshape(-1)


def keep_rows(
    gram: Float[np.ndarray, "channels channels"],
    kernel: Float[np.ndarray, "channels out"],
    groups: Iterable[int],
    *,
    group_size: int = 1,
) -> Kept:
    """The kept rows unchanged, and what is lost so.

    Example:
        >>> keep_rows(np.eye(2), np.array([[1.0], [2.0]]), [1]).relative_error
        0.2
    """
    groups = tuple(sorted(groups))
    rows = channels_of(groups, group_size)
    kernel = np.asarray(kernel, np.float64)
    return Kept(groups, kernel[rows], _relative_error(gram, kernel, rows, kernel[rows]))


def refit(
    gram: Float[np.ndarray, "channels channels"],
    kernel: Float[np.ndarray, "channels out"],
    groups: Iterable[int],
    *,
    group_size: int = 1,
) -> Kept:
    """The rows that bring the output of the kept channels closest to the whole map's, and what is still lost.

    With every group kept the kernel is returned as it is and nothing is lost.

    Example: a channel that copies another takes over its row.

        >>> gram, kernel = np.ones((2, 2)), np.array([[1.0], [2.0]])
        >>> kept = refit(gram, kernel, [1])
        >>> round(float(kept.kernel[0, 0]), 2), round(kept.relative_error, 3)
        (3.0, 0.0)
    """
    gram, kernel = np.asarray(gram, np.float64), np.asarray(kernel, np.float64)
    groups = tuple(sorted(groups))
    if len(groups) * group_size == len(gram):
        return Kept(groups, kernel, 0.0)
    rows = channels_of(groups, group_size)
    damped = _damped(gram)
    factor = scipy.linalg.cho_factor(damped[np.ix_(rows, rows)])
    solved = scipy.linalg.cho_solve(factor, damped[rows] @ kernel)
    return Kept(groups, solved, _relative_error(gram, kernel, rows, solved))


def prune(
    gram: Float[np.ndarray, "channels channels"],
    kernel: Float[np.ndarray, "channels out"],
    num_keep: int,
    *,
    group_size: int = 1,
    num_classes: int = 1,
    chunk: int = 1,
    num_swaps: int = 0,
    swap_candidates: int = 32,
) -> Kept:
    """The `num_keep` groups that together lose least, by removal and then local search.

    Args:
        gram, kernel: statistics of the whole map; see the module.
        num_classes: the groups fall, in order, into so many classes of which equally many stay (query heads by the
            key/value head that they share).
        chunk: groups removed at a time before what is left is refitted; 1 is the most careful.
        num_swaps: at most so many exchanges of a kept for a removed group, each the best one of those looked at.
        swap_candidates: kept groups that an exchange may give up: those whose removal alone would cost least.
    Raises: InputError when the sizes do not fit together, nothing would be kept, or `chunk` is below 1.
    """
    if chunk < 1:
        raise InputError(f"chunk is {chunk}: at least one group goes at a time")
    gram, kernel = np.asarray(gram, np.float64), np.asarray(kernel, np.float64)
    num_groups, rest = divmod(len(gram), group_size)
    if rest or gram.shape != (len(gram), len(gram)) or len(kernel) != len(gram):
        raise InputError(
            f"kernel {kernel.shape}, gram matrix {gram.shape} and groups of {group_size} do not fit together"
        )
    if not 1 <= num_keep <= num_groups or num_keep % num_classes or num_groups % num_classes:
        raise InputError(
            f"{num_keep} of {num_groups} groups cannot be kept: keep at least 1 and at most all, and as many of each "
            f"of {num_classes} classes"
        )
    if num_keep == num_groups:
        return refit(gram, kernel, range(num_groups), group_size=group_size)
    state = _State(_damped(gram), kernel, group_size, num_classes)
    while len(state.kept) > num_keep:
        state.remove(state.cheapest(min(chunk, len(state.kept) - num_keep), num_keep // num_classes))
    for _ in range(num_swaps):
        swap = state.best_swap(swap_candidates)
        if swap is None:
            break
        state.restart([group for group in state.kept if group != swap[0]] + [swap[1]])
    return refit(gram, kernel, state.kept, group_size=group_size)


def _damped(gram: Float64[np.ndarray, "channels channels"]) -> Float64[np.ndarray, "channels channels"]:
    mean = float(np.trace(gram)) / len(gram)
    return gram + (DAMPING * mean if mean > 0 else 1.0) * np.eye(len(gram))


def _relative_error(gram: np.ndarray, kernel: np.ndarray, rows: np.ndarray, solved: np.ndarray) -> float:
    change = kernel.copy()
    change[rows] -= solved
    energy = float(np.sum(kernel * (gram @ kernel)))
    return max(float(np.sum(change * (gram @ change))), 0.0) / max(energy, 1e-300)


class _State:
    """The kept groups, the inverse of their gram matrix and their refitted rows; removed ones are zero in both."""

    def __init__(self, gram: np.ndarray, kernel: np.ndarray, size: int, num_classes: int):
        self.gram, self.size = gram, size
        self.target = gram @ kernel
        self.num_groups = len(gram) // size
        self.class_of = np.arange(self.num_groups) * num_classes // self.num_groups
        self.restart(range(self.num_groups))

    def restart(self, kept: Iterable[int]) -> None:
        """Keeps these groups; inverts anew, so that no error of many updates stays."""
        self.kept = sorted(kept)
        rows = channels_of(self.kept, self.size)
        self.inverse, self.rows = np.zeros_like(self.gram), np.zeros_like(self.target)
        factor = scipy.linalg.cho_factor(self.gram[np.ix_(rows, rows)])
        block = scipy.linalg.cho_solve(factor, np.eye(len(rows)))
        self.inverse[np.ix_(rows, rows)] = block
        self.rows[rows] = block @ self.target[rows]

    def removal_costs(self) -> Float64[np.ndarray, "kept"]:
        """By how much the objective rises when one group goes and the others are refitted."""
        rows = self._rows_of(self.rows, self.kept)
        return 0.5 * np.sum(rows * np.linalg.solve(self._blocks(self.inverse, self.kept), rows), axis=(1, 2))

    def cheapest(self, count: int, least: int) -> list[int]:
        """At most `count` groups whose removal costs least, leaving every class at least `least`."""
        room = collections.Counter(self.class_of[self.kept].tolist())
        chosen: list[int] = []
        for place in np.argsort(self.removal_costs(), kind="stable"):
            of = int(self.class_of[self.kept[place]])
            if room[of] > least and len(chosen) < count:
                room[of] -= 1
                chosen.append(self.kept[place])
        return chosen

    def remove(self, groups: Sequence[int]) -> None:
        gone = channels_of(groups, self.size)
        into = np.linalg.solve(self.inverse[np.ix_(gone, gone)], self.inverse[gone])  # [gone n]
        self.rows -= into.T @ self.rows[gone]
        self.inverse -= self.inverse[:, gone] @ into
        self.rows[gone], self.inverse[gone], self.inverse[:, gone] = 0.0, 0.0, 0.0
        self.kept = [group for group in self.kept if group not in set(groups)]

    def best_swap(self, most: int) -> tuple[int, int] | None:
        """The exchange (kept, removed) that lowers the objective most, of those that give up one of `most` groups.

        A removed group's channels, projected on what the kept ones leave open (a Schur complement), say exactly what
        taking it back would gain; giving up a kept group changes that complement by a term of the group's size.
        """
        removed = np.array(sorted(set(range(self.num_groups)) - set(self.kept)), np.int64)
        if not len(removed):
            return None
        costs = self.removal_costs()
        open_rows = channels_of(removed.tolist(), self.size)
        across = self.gram[open_rows] @ self.inverse  # [removed channels, n]
        missing = (self.target[open_rows] - self.gram[open_rows] @ self.rows).reshape(
            len(removed), self.size, -1
        )
        by_group = across.reshape(len(removed), self.size, -1)
        reached = np.einsum("gin,gjn->gij", by_group, self._rows_of(self.gram, removed))
        schur = self._blocks(self.gram, removed) - reached
        best, found = 1e-9 * abs(0.5 * float(np.sum(self.rows * self.target))), None
        for place in np.argsort(costs, kind="stable")[:most]:
            group = self.kept[place]
            columns = channels_of([group], self.size)
            precision = np.linalg.inv(self.inverse[np.ix_(columns, columns)])
            through = by_group[:, :, columns]
            gap = missing + through @ precision @ self.rows[columns]
            wider = schur + through @ precision @ np.swapaxes(through, 1, 2)
            gains = 0.5 * np.sum(gap * np.linalg.solve(wider, gap), axis=(1, 2)) - costs[place]
            gains[self.class_of[removed] != self.class_of[group]] = -np.inf
            if gains.max() > best:
                best, found = float(gains.max()), (group, int(removed[gains.argmax()]))
        return found

    def _blocks(self, matrix: np.ndarray, groups: Sequence[int] | np.ndarray) -> np.ndarray:
        """The diagonal blocks of a matrix [groups, size, size]."""
        grouped = matrix.reshape(self.num_groups, self.size, self.num_groups, self.size)
        return grouped[groups, :, groups, :]

    def _rows_of(self, matrix: np.ndarray, groups: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows of groups [groups, size, columns]."""
        return matrix.reshape(self.num_groups, self.size, matrix.shape[1])[groups]
