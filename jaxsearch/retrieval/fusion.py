"""Joining rankings of the same query by rank, which needs no fitting; sums with fitted weights are in `search`."""

import numpy as np
from jaxtyping import Float, Int

RANK_CONSTANT = 60.0
"""Of reciprocal rank fusion: the larger, the less the first ranks stand out."""


def reciprocal_rank_fusion(
    ranks: Int[np.ndarray, "s c"], *, constant: float = RANK_CONSTANT
) -> Float[np.ndarray, "c"]:
    """Returns Σ over systems of 1 / (constant + rank) for each document, float64.

    Args:
      ranks: ranks from 1, a row per system; 0 where the system did not find the document, which adds nothing.

    Source: Cormack, Clarke, Buettcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank
    Learning Methods", SIGIR 2009.

    Example: the second document is second and first, the first one is first only.

    >>> reciprocal_rank_fusion(np.array([[1, 2], [0, 1]]), constant=1.0).round(4).tolist()
    [0.5, 0.8333]
    """
    return np.where(ranks > 0, 1.0 / (constant + ranks), 0.0).sum(axis=0)
