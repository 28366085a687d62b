"""Joining rankings of the same queries: by rank (no parameters to fit) or by weighted, standardised scores."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxsearch.data.records import Qrels, Run
from jaxsearch.errors import InputError
from jaxsearch.metrics import rank_documents, rank_metrics

RANK_CONSTANT = 60.0
"""Of reciprocal rank fusion: the larger, the less the first ranks stand out."""


class FittedWeight(NamedTuple):
    """The best weight of the first system, the metric it reached, and the whole curve {weight: metric}."""

    weight: float
    value: float
    curve: dict[float, float]


def reciprocal_rank_fusion(runs: Sequence[Run], *, constant: float = RANK_CONSTANT) -> Run:
    """Sum over runs of 1 / (constant + rank), rank from 1; a run without the document adds nothing.

    Source: Cormack, Clarke, Buettcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank
    Learning Methods", SIGIR 2009.

    Example: b is second and first, a is first only.

    >>> fused = reciprocal_rank_fusion([{"q": {"a": 9.0, "b": 8.0}}, {"q": {"b": 0.1}}], constant=1.0)
    >>> {document: round(score, 4) for document, score in fused["q"].items()}
    {'a': 0.5, 'b': 0.8333}
    """
    fused: Run = {}
    for run in runs:
        for query, scores in run.items():
            target = fused.setdefault(query, {})
            for rank, document in enumerate(rank_documents(scores), start=1):
                target[document] = target.get(document, 0.0) + 1.0 / (constant + rank)
    return fused


def standardise(scores: Mapping[str, float]) -> dict[str, float]:
    """One query's scores with mean 0 and standard deviation 1; all 0 when they are equal.

    >>> standardise({"a": 3.0, "b": 1.0})
    {'a': 1.0, 'b': -1.0}
    """
    if not scores:
        return {}
    values = np.array(list(scores.values()), np.float64)
    spread = values.std()
    values = (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)
    return dict(zip(scores, values.tolist(), strict=True))


def weighted_fusion(runs: Sequence[Run], weights: Sequence[float]) -> Run:
    """Weighted sum of each run's standardised scores; a document that a run lacks gets the run's lowest
    score.

    Standardising per query makes logits and cosines comparable; it needs a list of candidates, which
    re-ranking has.

    Raises:
      InputError: not one weight per run.
    """
    if len(runs) != len(weights):
        raise InputError(f"{len(weights)} weights for {len(runs)} runs; give one per run")
    fused: Run = {}
    for query in dict.fromkeys(query for run in runs for query in run):
        parts = [standardise(run.get(query, {})) for run in runs]
        lowest = [min(part.values(), default=0.0) for part in parts]
        fused[query] = {
            document: sum(
                weight * part.get(document, low)
                for weight, part, low in zip(weights, parts, lowest, strict=True)
            )
            for document in dict.fromkeys(document for part in parts for document in part)
        }
    return fused


def fit_weight(
    first: Run,
    second: Run,
    qrels: Qrels,
    *,
    threshold: int,
    metric: str = "ndcg@10",
    num_steps: int = 20,
) -> FittedWeight:
    """The weight w in [0, 1] for which w * first + (1 - w) * second has the best mean metric, on a grid.

    Fit it on queries that are not reported on. Among equals the weight nearest to one half wins, as the least
    committed.

    Raises:
      InputError: no query of `qrels` has a value of the metric.
    """
    curve = {}
    for step in range(num_steps + 1):
        weight = step / num_steps
        fused = weighted_fusion([first, second], [weight, 1.0 - weight])
        values = rank_metrics(qrels, fused, threshold=threshold, metrics=(metric,))[metric]
        if not values:
            raise InputError(f"no validation query has a value of {metric}, so no weight can be fitted")
        curve[weight] = float(np.mean(list(values.values())))
    best = max(curve, key=lambda weight: (curve[weight], -abs(weight - 0.5)))
    return FittedWeight(best, curve[best], curve)
