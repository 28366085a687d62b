"""Fits the orders of a search on graded queries, states what each reaches, and chooses the one to serve.

Weights and calibration are fitted on all queries that are given. What an order with fitted weights reaches is stated by
cross-fitting: each query is ranked with weights that were chosen without its fold. The first stage alone decides which
candidates the ranker sees, and its weight is that of all queries.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxsearch.calibration import calibration_error, fit_isotonic
from jaxsearch.data.records import Qrels
from jaxsearch.errors import InputError
from jaxsearch.metrics import Interval, PerQuery, bootstrap_ci, paired_bootstrap, rank_metrics
from jaxsearch.search.candidates import Candidates
from jaxsearch.search.orders import HEADLINE, UNFITTED, Order, Orders, arrange, head_of

BASELINE = "sum"
"""What every other order has to beat."""
NUM_FOLDS = 5
SHARES = tuple(step / 20 for step in range(21))
"""Shares of BM25 in `sum` that are tried, and but for the first those of the ranker in `sum+ranker`."""


@dataclasses.dataclass(frozen=True)
class GradedCandidates:
    """Validation queries with the candidates of their first stage and their grades.

    Attributes:
      candidates: by query; positions are those of `ids`.
      ids: document ids of the corpus.
      qrels: grades of the same queries.
      threshold: the least grade that is relevant.
    """

    candidates: Mapping[str, Candidates]
    ids: Sequence[str]
    qrels: Qrels
    threshold: int

    def values(
        self, order: Order, first: Order | None = None, ranker_scores: Mapping[str, np.ndarray] | None = None
    ) -> PerQuery:
        """NDCG@10 of each query in that order. Raises: InputError when no query has a value."""
        run = {}
        for query, found in self.candidates.items():
            scored = () if ranker_scores is None else ranker_scores[query]
            places, _ = arrange(found, order, first or order, scored)
            ranked = [self.ids[int(position)] for position in found.positions[places]]
            run[query] = {key: float(-rank) for rank, key in enumerate(ranked)}
        values = rank_metrics(self.qrels, run, threshold=self.threshold, metrics=(HEADLINE,))[HEADLINE]
        if not values:
            raise InputError(f"no validation query has a value of {HEADLINE}, so no order can be fitted")
        return values


@dataclasses.dataclass(frozen=True)
class Fitted:
    """An order and its cross-fitted values by query."""

    order: Order
    values: PerQuery


def fit_sum(graded: GradedCandidates) -> Fitted:
    """The share of BM25 in [0, 1] whose sum with the similarity has the best NDCG@10.

    Among equals the share nearest to one half wins, as the least committed.
    """
    orders = [Order("sum", _without_zeros(similarity=1 - share, bm25=share)) for share in SHARES]
    return _best(orders, [graded.values(order) for order in orders])


def fit_ranked(graded: GradedCandidates, first: Order, ranker_scores: Mapping[str, np.ndarray]) -> Fitted:
    """The share of the ranker in (0, 1] whose sum with the first stage's has the best NDCG@10.

    Shares are of scores that vary equally within a query, over all queries.
    """
    within = {"first": [], "ranker": []}
    for query, scores in ranker_scores.items():
        found = graded.candidates[query]
        head = found.at(head_of(found, first, len(scores)))
        within["first"].append(_centred(first.scores(head)))
        within["ranker"].append(_centred(np.asarray(scores, np.float64)))
    scale, other = (float(np.concatenate(parts).std()) or 1.0 for parts in within.values())
    orders = [
        Order(
            "sum+ranker",
            _without_zeros(**{name: (1 - share) * weight / scale for name, weight in first.weights.items()})
            | {"ranker": share / other},
        )
        for share in SHARES[1:]
    ]
    return _best(orders, [graded.values(order, first, ranker_scores) for order in orders])


def fit_orders(
    graded: GradedCandidates,
    fitted_sum: Fitted,
    ranker_scores: Mapping[str, np.ndarray],
    *,
    rank_depth: int,
    wanted: str = "",
    allow_worse: bool = False,
) -> Orders:
    """Fits every order, states its NDCG@10, and chooses the one to serve.

    The fitted sum is served unless another order is better by more than chance (95 % interval of the paired difference
    above 0). An order with the ranker, which costs far more, must be so against the best order without it.

    Args:
      fitted_sum: what `fit_sum` gave for these queries, and perhaps for more.
      ranker_scores: by query, the ranker's scores of the best `rank_depth` candidates of that sum, in its order.
      wanted: the order to serve whatever its NDCG@10; empty: chosen.
      allow_worse: accept a `wanted` order that is below the chosen one; without one, serve the best order that uses the
        ranker.

    Raises: InputError when `wanted` is unknown, or below the chosen one without `allow_worse`.
    """
    first = fitted_sum.order
    found = {"sum+ranker": fit_ranked(graded, first, ranker_scores)}
    own = found["sum+ranker"].values.keys()
    found["sum"] = Fitted(first, {query: fitted_sum.values[query] for query in own})
    for order in UNFITTED:
        scored = ranker_scores if order.uses_ranker else None
        found[order.name] = Fitted(order, graded.values(order, first, scored))
    names = [name for name in ("bm25", "encoder", "rrf", "sum", "ranker", "sum+ranker") if name in found]
    orders = {}
    for name in names:
        order, values = found[name].order, found[name].values
        scored = ranker_scores if order.uses_ranker else None
        orders[name] = dataclasses.replace(
            order,
            validation=bootstrap_ci(values),
            calibration=fit_isotonic(*_pairs(graded, order, first, scored, list(values))),
        )
    chosen, reason = choose({name: found[name].values for name in names}, orders)
    if wanted or allow_worse:
        chosen, reason = _overruled(orders, chosen, reason, wanted, allow_worse)
    return Orders(orders, chosen, reason, rank_depth)


def choose(values: Mapping[str, PerQuery], orders: Mapping[str, Order]) -> tuple[str, str]:
    """The order to serve and a sentence that says why; see `fit_orders`."""
    means = {name: float(np.mean(list(per_query.values()))) for name, per_query in values.items()}

    def best(names: Sequence[str]) -> str:
        return max(names, key=lambda name: means[name])

    def gain(name: str, over: str) -> Interval:
        return paired_bootstrap(values[name], values[over])

    others = [name for name in means if not orders[name].uses_ranker and name != BASELINE]
    plain = best([BASELINE, *(name for name in others if gain(name, BASELINE).low > 0)])
    ranked = best([name for name in means if orders[name].uses_ranker])
    difference = gain(ranked, plain)
    told = (
        f"NDCG@10 on {len(values[plain])} validation queries is {means[ranked]:.3f} with it ({ranked}) and "
    )
    told += f"{means[plain]:.3f} without ({plain}), difference {_signed(difference)}."
    if difference.low > 0:
        return ranked, f"Served: {ranked}. The ranker earns its place: {told}"
    return plain, f"Served: {plain}, without the ranker, which has not earned its place: {told}"


def held_out_error(
    graded: GradedCandidates, order: Order, first: Order, scored: Mapping | None
) -> float | None:
    """The expected calibration error of a map fitted on every other query, asked on the rest; None for one query."""
    queries = list(graded.candidates)
    if len(queries) < 2:
        return None
    fitted_on = fit_isotonic(*_pairs(graded, order, first, scored, queries[::2]))
    scores, is_relevant = _pairs(graded, order, first, scored, queries[1::2])
    return calibration_error(fitted_on(scores), is_relevant)


def _overruled(
    orders: Mapping[str, Order], chosen: str, reason: str, wanted: str, allow_worse: bool
) -> tuple[str, str]:
    """`wanted`, or the best order with the ranker, in place of the chosen one."""
    names = [wanted] if wanted else [name for name, order in orders.items() if order.uses_ranker]
    if names[0] not in orders:
        raise InputError(f"unknown order {wanted!r}; there are {', '.join(orders)}")
    value = {name: order.validation.value for name, order in orders.items() if order.validation}
    taken = max(names, key=lambda name: value[name])
    if taken == chosen:
        return chosen, reason
    if value[taken] < value[chosen] and not allow_worse:
        raise InputError(
            f"order {taken} reaches NDCG@10 {value[taken]:.3f} on the validation queries, {chosen} {value[chosen]:.3f}:"
            " search would be worse with it"
        )
    stated = f"Served: {taken}, as it was asked for (NDCG@10 {value[taken]:.3f}). Without being asked: "
    return taken, stated + reason.removeprefix("Served: ")


def _best(orders: Sequence[Order], values: Sequence[PerQuery]) -> Fitted:
    """The order with the best mean, and values in which each query's order was chosen by the other folds."""
    queries = sorted(values[0])
    table = np.array([[per_query[query] for query in queries] for per_query in values])
    middle = np.abs(np.arange(len(orders)) - (len(orders) - 1) / 2)

    def best(columns: np.ndarray) -> int:
        means = table[:, columns].mean(axis=1).round(12)
        return int(np.lexsort((middle, -means))[0])

    everything = np.arange(len(queries))
    crossed = np.zeros(len(queries))
    for fold in np.array_split(everything, min(NUM_FOLDS, len(queries))):
        others = np.setdiff1d(everything, fold)
        crossed[fold] = table[best(others if len(others) else fold), fold]
    return Fitted(orders[best(everything)], dict(zip(queries, crossed.tolist(), strict=True)))


def _pairs(
    graded: GradedCandidates, order: Order, first: Order, scored: Mapping | None, queries: Sequence[str]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """The order's scores of all candidates that it sorts, and 1 where the document is relevant."""
    scores, targets = [], []
    for query in queries:
        found = graded.candidates[query]
        places, values = arrange(found, order, first, () if scored is None else scored[query])
        is_scored = ~np.isnan(values)
        grades = graded.qrels.get(query, {})
        keys = [graded.ids[int(position)] for position in found.positions[places[is_scored]]]
        scores.append(values[is_scored])
        targets.append([grades.get(key, 0) >= graded.threshold for key in keys])
    return np.concatenate(scores), np.concatenate(targets).astype(np.float64)


def _centred(scores: Float[np.ndarray, "c"]) -> Float[np.ndarray, "c"]:
    return scores - scores.mean() if len(scores) else scores


def _without_zeros(**weights: float) -> dict[str, float]:
    return {name: weight for name, weight in weights.items() if weight}


def _signed(interval: Interval) -> str:
    value, low, high = interval
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
