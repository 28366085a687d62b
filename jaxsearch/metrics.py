"""How good a ranking or a judge is: NumPy only, per query first, averages and intervals after.

Rankings are `Run`s, truth is `Qrels` (see `data.records`); ties in score are broken by document id, ascending, so a
figure never depends on the order of a dict. A query has no value of a metric that it could not score on (no gain, no
relevant document); whether it has one depends on the qrels alone, so two systems always share their queries.
"""

import dataclasses
import functools
import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from jaxsearch.data.records import MAX_GRADE, NUM_GRADES, Qrels, Run
from jaxsearch.errors import InputError

METRICS = ("ndcg@10", "ndcg_exp@10", "recall@100", "mrr@10", "precision@10", "poor_match_rate@10")
HEADLINE = "ndcg@10"  # by which systems are compared, and orders fitted and chosen
POOR_BELOW = 2
_METRIC = re.compile(r"(ndcg|ndcg_exp|recall|mrr|precision|poor_match_rate)@([1-9]\d*)")

PerQuery = dict[str, float]
_Number = TypeVar("_Number", int, float)


class Interval(NamedTuple):
    """An estimate with the ends of its percentile bootstrap interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class _Measure:
    kind: str
    depth: int

    @classmethod
    def parse(cls, name: str) -> "_Measure":
        match = _METRIC.fullmatch(name)
        if match is None:
            raise InputError(
                f"unknown metric {name!r}; use one of {', '.join(METRICS)} (any cut-off after @)"
            )
        return cls(match[1], int(match[2]))

    def is_defined(self, grades: Mapping[str, int], threshold: int) -> bool:
        least = 1 if self.kind.startswith("ndcg") else threshold
        return self.kind == "poor_match_rate" or any(grade >= least for grade in grades.values())


def rank_documents(scores: Mapping[str, float]) -> list[str]:
    """Document ids, best first; equal scores in ascending order of id.

    >>> rank_documents({"b": 1.0, "a": 1.0, "c": 2.0})
    ['c', 'a', 'b']
    """
    return sorted(scores, key=lambda document: (-scores[document], document))


def restrict(
    pairs: Mapping[str, Mapping[str, _Number]], documents: AbstractSet[str]
) -> dict[str, dict[str, _Number]]:
    """A run or qrels over `documents` only; every query stays, perhaps with nothing left."""
    return {
        query: {document: value for document, value in values.items() if document in documents}
        for query, values in pairs.items()
    }


def rank_metrics(
    qrels: Qrels,
    run: Run,
    *,
    threshold: int,
    metrics: Sequence[str] = METRICS,
    engine: Literal["ir_measures", "numpy"] | None = None,
) -> dict[str, PerQuery]:
    """Ranking metrics of one system, per query of `qrels`.

    Args:
      qrels: which queries are scored, and their grades 0..4; a document without a grade has grade 0.
      run: scores; higher is better. A query that is missing has retrieved nothing (value 0).
      threshold: documents of this grade or above are relevant for recall, MRR and precision.
      metrics: names `<metric>@<cut-off>`. `ndcg` has gain = grade, `ndcg_exp` gain = 2**grade - 1; both
        discount by log2(rank + 1) and divide by the best ordering of all graded documents. `poor_match_rate`
        is the share of places down to the cut-off without a document of grade 2 (of `threshold`, if lower) or above.
      engine: ir_measures (over trec_eval) or the NumPy implementation below, which equals it within 1e-6;
        None takes ir_measures where it is installed.

    Returns:
      {metric: {query: value in [0, 1]}}, without the queries that a metric is not defined for.

    Raises:
      InputError: unknown metric; a score that is NaN.

    Accuracy: the engines agree within 1e-6 on runs with ties (`test_metrics.py::test_engines_agree`).

    Source: Jaervelin, Kekaelaeinen, "Cumulated gain-based evaluation of IR techniques", 2002 (gain by grade,
    log2 discount as in trec_eval); Burges et al. 2005 for the exponential gain.

    Example: grades 0 then 2 then 3. Linear: (2/log2 3 + 3/2) / (3 + 2/log2 3).

    >>> qrels, run = {"q": {"a": 3, "b": 2}}, {"q": {"c": 0.9, "b": 0.8, "a": 0.7}}
    >>> values = rank_metrics(qrels, run, threshold=2, metrics=("ndcg@10", "mrr@10"))
    >>> print(f"{values['ndcg@10']['q']:.4f} {values['mrr@10']['q']:.4f}")
    0.6480 0.5000
    """
    measures = {name: _Measure.parse(name) for name in metrics}
    rankings = {query: _checked_ranking(query, run.get(query, {})) for query in qrels}
    if engine is None:
        engine = "ir_measures" if importlib.util.find_spec("ir_measures") else "numpy"
    standard = {name: measure for name, measure in measures.items() if measure.kind != "poor_match_rate"}
    compute = _with_ir_measures if engine == "ir_measures" else _with_numpy
    values = compute(standard, qrels, rankings, threshold)
    for name, measure in measures.items():
        if measure.kind == "poor_match_rate":
            values[name] = {
                query: _poor_match_rate(rankings[query], grades, measure.depth, min(POOR_BELOW, threshold))
                for query, grades in qrels.items()
            }
    return {
        name: {
            query: values[name].get(query, 0.0)
            for query, grades in qrels.items()
            if measure.is_defined(grades, threshold)
        }
        for name, measure in measures.items()
    }


def _checked_ranking(query: str, scores: Mapping[str, float]) -> list[str]:
    for document, score in scores.items():
        if math.isnan(score):
            raise InputError(f"the score of query {query!r}, document {document!r} is NaN; fix the scorer")
    return rank_documents(scores)


def _with_ir_measures(
    measures: Mapping[str, _Measure], qrels: Qrels, rankings: Mapping[str, list[str]], threshold: int
) -> dict[str, PerQuery]:
    import ir_measures
    from ir_measures import RR, P, R, nDCG

    exponential = {grade: 2**grade - 1 for grade in range(1, MAX_GRADE + 1)}
    builders: dict[str, Callable[[int], Any]] = {
        "ndcg": lambda depth: nDCG @ depth,
        "ndcg_exp": lambda depth: nDCG(gains=exponential) @ depth,
        "recall": lambda depth: R(rel=threshold) @ depth,
        "mrr": lambda depth: RR(rel=threshold) @ depth,
        "precision": lambda depth: P(rel=threshold) @ depth,
    }
    values: dict[str, PerQuery] = {name: {} for name in measures}
    graded = {query: grades for query, grades in qrels.items() if grades}
    # Ranks as scores: exact in the C code's float32, so its own tie rule is never asked.
    ranked = {
        query: {document: float(-rank) for rank, document in enumerate(rankings[query])} for query in graded
    }
    if any(ranked.values()):
        for name, measure in measures.items():
            # One call each: in one call, nDCG without gains is computed with the gains of an nDCG that has
            # them.
            standard = builders[measure.kind](measure.depth)
            for result in ir_measures.iter_calc([standard], graded, ranked):
                values[name][result.query_id] = float(result.value)
    return values


def _with_numpy(
    measures: Mapping[str, _Measure], qrels: Qrels, rankings: Mapping[str, list[str]], threshold: int
) -> dict[str, PerQuery]:
    gains: dict[str, Callable[[int], float]] = {"ndcg": float, "ndcg_exp": lambda grade: 2.0**grade - 1.0}
    values: dict[str, PerQuery] = {name: {} for name in measures}
    for query, grades in qrels.items():
        found = [grades.get(document, 0) for document in rankings[query]]
        relevant = np.array([grade >= threshold for grade in found], dtype=bool)
        num_relevant = sum(grade >= threshold for grade in grades.values())
        for name, measure in measures.items():
            top = relevant[: measure.depth]
            if measure.kind in gains:
                gain = gains[measure.kind]
                best = _dcg([gain(grade) for grade in sorted(grades.values(), reverse=True)[: measure.depth]])
                value = _dcg([gain(grade) for grade in found[: measure.depth]]) / best if best else 0.0
            elif measure.kind == "recall":
                value = top.sum() / num_relevant if num_relevant else 0.0
            elif measure.kind == "mrr":
                value = 1.0 / (1 + top.argmax()) if top.any() else 0.0
            else:
                value = top.sum() / measure.depth
            values[name][query] = float(value)
    return values


def _dcg(gains: Sequence[float]) -> float:
    return math.fsum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))


def _poor_match_rate(ranking: Sequence[str], grades: Mapping[str, int], depth: int, least: int) -> float:
    good = sum(grades.get(document, 0) >= least for document in ranking[:depth])
    return (depth - good) / depth


def poor_match_floor(qrels: Qrels, *, threshold: int = POOR_BELOW, depth: int = 10) -> float:
    """Mean poor match rate@`depth` of a perfect ranking; no ranking has less.

    Example: one good document for ten places.

    >>> poor_match_floor({"q": {"a": 4, "b": 1}})
    0.9
    """
    if not qrels:
        raise InputError("no queries: give qrels with at least one")
    good = [sum(g >= min(POOR_BELOW, threshold) for g in grades.values()) for grades in qrels.values()]
    return float(np.mean([max(0, depth - count) / depth for count in good]))


def auc(labels: Sequence[bool] | np.ndarray, scores: Sequence[float] | np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties counting one half; NaN without both classes.

    Example: of the four pairs, three are in order.

    >>> auc([True, False, True, False], [0.9, 0.8, 0.7, 0.1])
    0.75
    """
    is_positive = np.asarray(labels, dtype=bool)
    _, inverse, counts = np.unique(
        np.asarray(scores, dtype=np.float64), return_inverse=True, return_counts=True
    )
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2.0
    positives = int(is_positive.sum())
    negatives = is_positive.size - positives
    if not positives or not negatives:
        return math.nan
    rank_sum = float(mean_ranks[inverse][is_positive].sum())
    return (rank_sum - positives * (positives + 1) / 2.0) / (positives * negatives)


def run_auc(qrels: Qrels, run: Run, *, threshold: int) -> dict[str, float]:
    """AUC of relevant (grade >= threshold) against the rest, over the scored pairs of a run.

    Returns:
      `auc_pooled` over all pairs, where scores must compare across queries, and `auc_per_query`, the mean
      over the queries that have both classes among their scored documents; NaN where there is none.
    """
    labels = [
        np.array([qrels[query].get(document, 0) >= threshold for document in run[query]], dtype=bool)
        for query in run
        if query in qrels
    ]
    scores = [np.array(list(run[query].values()), dtype=np.float64) for query in run if query in qrels]
    if not labels:
        return {"auc_pooled": math.nan, "auc_per_query": math.nan}
    single = [value for value in map(auc, labels, scores) if not math.isnan(value)]
    return {
        "auc_pooled": auc(np.concatenate(labels), np.concatenate(scores)),
        "auc_per_query": float(np.mean(single)) if single else math.nan,
    }


def weighted_kappa(
    first: Sequence[int] | np.ndarray,
    second: Sequence[int] | np.ndarray,
    weights: Literal["linear", "quadratic"] = "linear",
    num_grades: int = NUM_GRADES,
) -> float:
    """Cohen's kappa with disagreement |i - j| (linear) or (i - j)^2 (quadratic) between two graders.

    Returns:
      1 for perfect agreement, 0 for chance, below 0 for worse; NaN when both graders are constant and equal.

    Raises:
      InputError: different lengths, nothing to compare, a grade outside 0..num_grades-1.

    Source: Cohen, "Weighted kappa", Psychological Bulletin 70(4), 1968.

    Example: observed disagreement 1/4; by chance (margins 1/2, 1/2 and 1/4, 3/4) it would be 1/2.

    >>> weighted_kappa([0, 0, 1, 1], [0, 1, 1, 1])
    0.5
    """
    return float(_kappa(_confusion(first, second, num_grades), weights))


def _confusion(first: Any, second: Any, num_grades: int) -> np.ndarray:
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise InputError(f"grades must be two equally long lists; got shapes {first.shape}, {second.shape}")
    both = np.stack([first, second])
    if (both != both.astype(np.int64)).any() or both.min() < 0 or both.max() >= num_grades:
        raise InputError(f"grades must be whole numbers in 0..{num_grades - 1}")
    both = both.astype(np.int64)
    return np.bincount(both[0] * num_grades + both[1], minlength=num_grades**2).reshape(
        num_grades, num_grades
    )


def _kappa(confusion: np.ndarray, weights: str) -> np.ndarray:
    """Kappa of confusion counts [*b g g]."""
    grades = np.arange(confusion.shape[-1])
    distance = np.abs(grades[:, None] - grades[None, :]).astype(np.float64)
    if weights == "quadratic":
        distance = distance**2
    probs = confusion / confusion.sum(axis=(-2, -1), keepdims=True)
    chance = probs.sum(-1)[..., :, None] * probs.sum(-2)[..., None, :]
    expected = (distance * chance).sum((-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1.0 - (distance * probs).sum((-2, -1)) / expected, np.nan)


def kappa_interval(
    first: Sequence[int] | np.ndarray,
    second: Sequence[int] | np.ndarray,
    *,
    groups: Sequence[Any] | np.ndarray | None = None,
    weights: Literal["linear", "quadratic"] = "linear",
    num_grades: int = NUM_GRADES,
    num_samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Weighted kappa with a bootstrap interval; `groups` (one per pair, e.g. its query) are resampled whole.

    Pairs of one query are not independent, so give the queries as groups; None resamples single pairs.
    """
    first, second = np.asarray(first), np.asarray(second)
    value = weighted_kappa(first, second, weights, num_grades)
    groups = np.arange(first.size) if groups is None else np.asarray(groups)
    group_ids = np.unique(groups, return_inverse=True)[1]
    num_groups = int(group_ids.max()) + 1
    cells = np.zeros((num_groups, num_grades, num_grades))
    np.add.at(cells, (group_ids, first.astype(np.int64), second.astype(np.int64)), 1.0)
    estimates = _resampled(
        lambda counts: _kappa(np.tensordot(counts, cells, axes=1), weights), num_groups, num_samples, seed
    )
    return Interval(value, *_ends(estimates, level))


def bootstrap_ci(
    values: PerQuery, *, num_samples: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean over queries with its percentile bootstrap interval; deterministic for a seed.

    Raises:
      InputError: no queries.
    """
    if not values:
        raise InputError("no query has a value, so there is no interval to compute")
    array = np.array([values[query] for query in sorted(values)])
    means = _resampled(lambda counts: counts @ array / array.size, array.size, num_samples, seed)
    return Interval(float(array.mean()), *_ends(means, level))


def paired_bootstrap(
    first: PerQuery, second: PerQuery, *, num_samples: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean over queries of first - second, both measured on the same queries, with its percentile interval.

    Raises:
      InputError: the two do not have the same queries.

    Source: Sakai, "Evaluating evaluation metrics based on the bootstrap", SIGIR 2006 (queries are resampled).

    >>> print(*(round(number, 6) for number in paired_bootstrap({"a": 0.5, "b": 0.7}, {"a": 0.4, "b": 0.6})))
    0.1 0.1 0.1
    """
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())[:3]
        raise InputError(f"paired comparison needs the same queries on both sides; only one side has {odd}")
    differences = {query: first[query] - second[query] for query in first}
    return bootstrap_ci(differences, num_samples=num_samples, seed=seed, level=level)


def _resampled(
    statistic: Callable[[np.ndarray], np.ndarray], size: int, num_samples: int, seed: int
) -> np.ndarray:
    """The statistic of resampling counts [samples size], in blocks of bounded memory."""
    block = max(1, min(num_samples, 4_000_000 // size))
    starts = range(0, num_samples, block)
    blocks = (_resampling_counts(size, min(block, num_samples - start), seed, start) for start in starts)
    return np.concatenate([statistic(counts) for counts in blocks])


@functools.lru_cache(maxsize=4)
def _resampling_counts(size: int, num_samples: int, seed: int, start: int) -> np.ndarray:
    """How often each of `size` queries is drawn; kept, since a table compares many systems on the same queries."""
    drawn = np.random.default_rng((seed, start)).integers(0, size, (num_samples, size))
    drawn += np.arange(num_samples)[:, None] * size
    counts = np.bincount(drawn.ravel(), minlength=num_samples * size).reshape(num_samples, size)
    return counts.astype(np.float32)


def _ends(estimates: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.nanquantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
