"""Fits the orders of a search on graded queries, states what each reaches, and chooses the one to serve.

The weighted sum of the first stage is the baseline: its one weight is fitted on all queries that it is stated on.
`sum+ranker`, which has to beat it, is stated by cross-fitting: the ranker's share, which each query is measured with,
was chosen without the query's fold. It sorts the candidates of the same sum, whose optimism is on both sides.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxsearch.calibration import calibration_error, fit_isotonic
from jaxsearch.data.records import Qrels
from jaxsearch.errors import InputError
from jaxsearch.metrics import HEADLINE, Interval, PerQuery, bootstrap_ci, paired_bootstrap, rank_metrics
from jaxsearch.search.candidates import RETRIEVE_DEPTH, Candidates
from jaxsearch.search.orders import NAMES, UNFITTED, Order, Orders, arrange, head_of

BASELINE = "sum"
"""The order that every other one has to beat."""
LEAST_QUERIES = 20
"""Fewer queries cannot tell orders apart: the bootstrap's interval over a handful of them is far too narrow."""
NUM_FOLDS = 5
SHARES = tuple(step / 20 for step in range(21))
"""What is tried: shares of BM25 in `sum`, and, without the first, shares of the ranker in `sum+ranker`."""
RankerScores = Mapping[str, Float[np.ndarray, "ranked"]]
"""By query, the ranker's scores of the first stage's best candidates, in its order."""


class NothingToFitError(InputError):
    """Raised when no query has a relevant document that could tell orders apart."""


class WorseOrderError(InputError):
    """Raised when a search would be worse in the order that is wanted."""


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

    def of(self, queries: Sequence[str]) -> "GradedCandidates":
        """The same for some of the queries."""
        return dataclasses.replace(
            self,
            candidates={query: self.candidates[query] for query in queries},
            qrels={query: self.qrels.get(query, {}) for query in queries},
        )

    def arranged(
        self, query: str, order: Order, first: Order, ranker_scores: RankerScores | None
    ) -> tuple[list[str], Float[np.ndarray, "c"]]:
        """Ids of what a search in this order finds by default, best first, and their scores."""
        found = self.candidates[query].found_by(order.sources)
        places, scores = arrange(found, order, first, () if ranker_scores is None else ranker_scores[query])
        positions = found.positions[places[:RETRIEVE_DEPTH]]
        return [self.ids[int(position)] for position in positions], scores[:RETRIEVE_DEPTH]

    def values(
        self, order: Order, first: Order | None = None, ranker_scores: RankerScores | None = None
    ) -> PerQuery:
        """NDCG@10 of each query in that order. Raises: NothingToFitError when no query has a value."""
        run = {}
        for query in self.candidates:
            ranked, _ = self.arranged(query, order, first or order, ranker_scores)
            run[query] = {key: float(-rank) for rank, key in enumerate(ranked)}
        values = rank_metrics(self.qrels, run, threshold=self.threshold, metrics=(HEADLINE,))[HEADLINE]
        if not values:
            raise NothingToFitError(
                f"no validation query has a value of {HEADLINE}, so no order can be fitted"
            )
        return values

    def pairs(
        self, queries: Sequence[str], order: Order, first: Order, ranker_scores: RankerScores | None
    ) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        """Scores of all candidates that the order sorts, and 1 where the document is relevant."""
        scores, targets = [np.zeros(0)], [np.zeros(0)]
        for query in queries:
            ranked, values = self.arranged(query, order, first, ranker_scores)
            grades = self.qrels.get(query, {})
            is_relevant = np.array([grades.get(key, 0) >= self.threshold for key in ranked], np.float64)
            is_scored = ~np.isnan(values)
            scores.append(values[is_scored])
            targets.append(is_relevant[is_scored])
        return np.concatenate(scores), np.concatenate(targets)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """An order with its values by query."""

    order: Order
    values: PerQuery


def fit_sum(graded: GradedCandidates) -> Order:
    """The share of BM25 in [0, 1] whose sum with the similarity has the best NDCG@10.

    Among equals the share nearest to one half wins, as the least committed.
    Raises: NothingToFitError when no query has a value.
    """
    orders = [Order("sum", _without_zeros(similarity=1 - share, bm25=share)) for share in SHARES]
    return orders[_best(_table([graded.values(order) for order in orders]))]


def fit_ranked(graded: GradedCandidates, first: Order, ranker_scores: RankerScores) -> Fitted:
    """The share of the ranker in (0, 1] whose sum with the first stage's score has the best NDCG@10, cross-fitted.

    Both scores are divided by their spread within a query, over all queries.
    """
    within = {"first": [np.zeros(1)], "ranker": [np.zeros(1)]}
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
    values = [graded.values(order, first, ranker_scores) for order in orders]
    table, queries = _table(values), np.arange(len(values[0]))
    crossed = np.zeros(len(queries))
    for fold in np.array_split(queries, min(NUM_FOLDS, len(queries))):
        others = np.setdiff1d(queries, fold)
        crossed[fold] = table[_best(table[:, others]), fold]
    return Fitted(orders[_best(table)], dict(zip(sorted(values[0]), crossed.tolist(), strict=True)))


def fit_orders(
    graded: GradedCandidates,
    first: Order,
    ranker_scores: RankerScores,
    *,
    rank_depth: int,
    wanted: str = "",
    allow_worse: bool = False,
) -> Orders:
    """Fits every order, states its NDCG@10, and chooses the one to serve.

    The fitted sum is served unless another order is better by more than chance (95 % interval of the paired difference
    above 0). An order with the ranker, which costs far more, must be so against the best order without it. Fewer than
    `LEAST_QUERIES` queries cannot tell.

    Args:
      first: the sum that `fit_sum` gave for these queries, and perhaps for more.
      ranker_scores: of the best `rank_depth` candidates of that sum.
      wanted: the order to serve whatever its NDCG@10; empty: chosen.
      allow_worse: accept a `wanted` order that is below the chosen one or a part; with none wanted, serve the best one
        that uses the ranker.

    Raises:
      WorseOrderError: `wanted` is worse, without `allow_worse`.
      InputError: `wanted` is unknown.
    """
    found = {
        "sum": Fitted(first, graded.values(first)),
        "sum+ranker": fit_ranked(graded, first, ranker_scores),
    }
    for order in UNFITTED:
        scores = ranker_scores if order.uses_ranker else None
        found[order.name] = Fitted(order, graded.values(order, first, scores))
    queries, orders = list(graded.candidates), {}
    for name in NAMES:
        order = found[name].order
        scores = ranker_scores if order.uses_ranker else None
        pairs = graded.pairs(queries, order, first, scores)
        calibration = fit_isotonic(*pairs) if len(pairs[0]) else None
        orders[name] = dataclasses.replace(
            order, validation=bootstrap_ci(found[name].values), calibration=calibration
        )
    plain, served, reason = choose({name: found[name].values for name in NAMES}, orders)
    if wanted or allow_worse:
        served, reason = _overruled(orders, served, reason, wanted, allow_worse)
    return Orders(orders, served, reason, rank_depth, plain=plain)


def choose(values: Mapping[str, PerQuery], orders: Mapping[str, Order]) -> tuple[str, str, str]:
    """The best order without the ranker, the order to serve, and a sentence that says why; see `fit_orders`."""
    means = {name: float(np.mean(list(per_query.values()))) for name, per_query in values.items()}
    count = len(values[BASELINE])
    if count < LEAST_QUERIES:
        reason = (
            f"Served: {BASELINE}, without the ranker: {count} validation queries are too few to tell what is "
        )
        return BASELINE, BASELINE, f"{reason}better by more than chance; it takes {LEAST_QUERIES}."

    def best(names: Sequence[str]) -> str:
        return max(names, key=lambda name: means[name])

    def gain(name: str, over: str) -> Interval:
        return paired_bootstrap(values[name], values[over])

    others = [name for name in means if not orders[name].uses_ranker and name != BASELINE]
    plain = best([BASELINE, *(name for name in others if gain(name, BASELINE).low > 0)])
    ranked = best([name for name in means if orders[name].uses_ranker])
    difference = gain(ranked, plain)
    told = f"NDCG@10 on {count} validation queries is {means[ranked]:.3f} with it ({ranked}) and {means[plain]:.3f} "
    told += f"without ({plain}), difference {_signed(difference)}."
    if difference.low > 0:
        return plain, ranked, f"Served: {ranked}. The ranker earns its place: {told}"
    reason = f"Served: {plain}, without the ranker, which has not earned its place: {told}"
    return plain, plain, reason


def held_out_error(
    graded: GradedCandidates, order: Order, first: Order, ranker_scores: RankerScores | None
) -> float | None:
    """The expected calibration error of a map fitted on every other query, asked on the rest; None for one query."""
    queries = list(graded.candidates)
    if len(queries) < 2:
        return None
    known = graded.pairs(queries[::2], order, first, ranker_scores)
    scores, is_relevant = graded.pairs(queries[1::2], order, first, ranker_scores)
    if not (len(known[0]) and len(scores)):
        return None
    return calibration_error(fit_isotonic(*known)(scores), is_relevant)


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
    better = max((chosen, "bm25", "encoder"), key=lambda name: value[name])
    if value[taken] < value[better] and not allow_worse:
        raise WorseOrderError(
            f"order {taken} reaches NDCG@10 {value[taken]:.3f} on the validation queries, {better} {value[better]:.3f}:"
            " search would be worse with it"
        )
    stated = f"Served: {taken}, as it was asked for (NDCG@10 {value[taken]:.3f}). Without being asked: "
    return taken, stated + reason.removeprefix("Served: ")


def _table(values: Sequence[PerQuery]) -> Float[np.ndarray, "o q"]:
    """A row for each of the orders, a column for each query, in the order of their ids."""
    return np.array([[per_query[query] for query in sorted(per_query)] for per_query in values])


def _best(table: Float[np.ndarray, "o q"]) -> int:
    """The row with the best mean; among equals the one nearest to the middle."""
    middle = np.abs(np.arange(len(table)) - (len(table) - 1) / 2)
    means = table.mean(axis=1).round(12) if table.shape[1] else np.zeros(len(table))
    return int(np.lexsort((middle, -means))[0])


def _centred(scores: Float[np.ndarray, "c"]) -> Float[np.ndarray, "c"]:
    return scores - scores.mean() if len(scores) else scores


def _without_zeros(**weights: float) -> dict[str, float]:
    return {name: weight for name, weight in weights.items() if weight}


def _signed(interval: Interval) -> str:
    value, low, high = interval
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
