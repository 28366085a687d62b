"""Orders: the ways to sort a query's candidates, and the set of them that a bundle can serve.

| order | sorts by |
| --- | --- |
| `bm25` | words alone |
| `encoder` | similarity alone |
| `rrf` | reciprocal rank fusion of both: nothing to fit |
| `sum` | a weighted sum of similarity and BM25, fitted on graded queries |
| `ranker` | the ranker's score of the best candidates of `sum` (`rrf` where nothing was fitted) |
| `sum+ranker` | a weighted sum of the ranker's score and `sum`, on the same candidates, fitted |

Fitting and choosing: `fitting`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxsearch.calibration import IsotonicMap
from jaxsearch.errors import InputError
from jaxsearch.metrics import Interval
from jaxsearch.retrieval.fusion import reciprocal_rank_fusion
from jaxsearch.search.candidates import SIGNAL_OF, SOURCES, Candidates, Source

SIGNALS = frozenset({*SIGNAL_OF.values(), "ranker"})
NAMES = ("bm25", "encoder", "rrf", "sum", "ranker", "sum+ranker")


@dataclasses.dataclass(frozen=True)
class Order:
    """One way to sort candidates.

    Attributes:
      name: one of `NAMES`.
      weights: by signal (`similarity`, `bm25`, `ranker`), the weights of the sum that sorts; empty for reciprocal
        rank fusion.
      validation: NDCG@10 on validation queries with its 95 % interval; None where it was not measured.
      calibration: from the sum to the probability that a document is relevant; None where none was fitted.
    """

    name: str
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    validation: Interval | None = None
    calibration: IsotonicMap | None = None

    @property
    def uses_ranker(self) -> bool:
        return "ranker" in self.weights

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources that find its candidates: one for `bm25` and `encoder`, both for all that fuse or rank."""
        alone: dict[str, tuple[Source, ...]] = {"bm25": ("bm25",), "encoder": ("embedding",)}
        return alone.get(self.name, SOURCES)

    def scores(
        self, candidates: Candidates, ranker_scores: Float[np.ndarray, "c"] | None = None
    ) -> Float[np.ndarray, "c"]:
        """Returns float64 scores, higher is better; `ranker_scores` are the ranker's, where it is read."""
        if not self.weights:
            return reciprocal_rank_fusion(np.stack(list(candidates.ranks.values())))
        signals = dict(candidates.signals)
        if ranker_scores is not None:
            signals["ranker"] = ranker_scores
        total = np.zeros(len(candidates), np.float64)
        for name, weight in self.weights.items():
            total += weight * np.asarray(signals[name], np.float64)
        return total

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "weights": dict(self.weights),
            "validation": None if self.validation is None else self.validation._asdict(),
            "calibration": None if self.calibration is None else dataclasses.asdict(self.calibration),
        }

    @classmethod
    def from_json(cls, stated: Mapping[str, Any]) -> "Order":
        calibration, validation = stated["calibration"], stated["validation"]
        return cls(
            stated["name"],
            dict(stated["weights"]),
            None if validation is None else Interval(**validation),
            None if calibration is None else IsotonicMap(tuple(calibration["x"]), tuple(calibration["y"])),
        )


UNFITTED = (
    Order("bm25", {"bm25": 1.0}),
    Order("encoder", {"similarity": 1.0}),
    Order("rrf"),
    Order("ranker", {"ranker": 1.0}),
)
"""The orders that need no fitting."""


@dataclasses.dataclass(frozen=True)
class Orders:
    """The orders of a bundle, and which one a search gets that asks for none.

    Attributes:
      orders: by name.
      default: name of the one that is served.
      reason: a sentence that says why.
      rank_depth: candidates that the ranker scores in the orders that use it.
      plain: name of the best order without the ranker, where the default has one.
    """

    orders: Mapping[str, Order]
    default: str
    reason: str
    rank_depth: int = 20
    plain: str = "rrf"

    def __post_init__(self) -> None:
        """Raises: InputError for orders that could not be served."""
        if missing := [order.name for order in UNFITTED if order.name not in self.orders]:
            raise InputError(f"the order {missing[0]!r} is missing")
        for name, order in self.orders.items():
            if name != order.name or not set(order.weights) <= SIGNALS:
                raise InputError(
                    f"order {name!r} has another name inside, or weighs more than {', '.join(sorted(SIGNALS))}"
                )
        for name in (self.default, self.plain):
            self[name]

    @classmethod
    def unfitted(cls, why: str = "nothing was fitted", *, rank_depth: int = 20) -> "Orders":
        """Reciprocal rank fusion, where no grades tell what is better; `why` there are none stands in the reason."""
        reason = (
            f"Served: rrf, reciprocal rank fusion of BM25 and embeddings, without the ranker: {why}, so that nothing "
            "could be fitted or compared."
        )
        return cls({order.name: order for order in UNFITTED}, "rrf", reason, rank_depth)

    def __getitem__(self, name: str) -> Order:
        """Raises: InputError that names the orders there are."""
        if name not in self.orders:
            raise InputError(f"unknown order {name!r}; there are {', '.join(self.orders)}")
        return self.orders[name]

    @property
    def first_stage(self) -> Order:
        """The order whose best candidates the ranker scores."""
        return self.orders.get("sum") or self["rrf"]

    @property
    def retrieval(self) -> Order:
        """The default, or the best order without the ranker where the default has one."""
        return self[self.plain if self[self.default].uses_ranker else self.default]

    @property
    def ranked(self) -> Order:
        """The default, or the best order with the ranker where the default has none."""
        if self[self.default].uses_ranker:
            return self[self.default]
        among = [order for order in self.orders.values() if order.uses_ranker]
        return max(among, key=lambda order: order.validation.value if order.validation else 0.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "orders": [order.to_json() for order in self.orders.values()],
            "default": self.default,
            "reason": self.reason,
            "rank_depth": self.rank_depth,
            "plain": self.plain,
        }

    @classmethod
    def load(cls, path: Path) -> "Orders":
        """Reads what `to_json` gave. Raises: InputError when the file is not such a set of orders."""
        try:
            stated = json.loads(path.read_text(encoding="utf-8"))
            orders = {entry["name"]: Order.from_json(entry) for entry in stated["orders"]}
            return cls(
                orders,
                stated["default"],
                stated["reason"],
                int(stated["rank_depth"]),
                stated["plain"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no orders ({error!r}); export the bundle again") from error


def arrange(
    candidates: Candidates,
    order: Order,
    first: Order,
    ranker_scores: Float[np.ndarray, "ranked"] | Sequence[float] = (),
) -> tuple[Int[np.ndarray, "c"], Float[np.ndarray, "c"]]:
    """Places of the candidates, best first, and the score that sorted each.

    The best `len(ranker_scores)` candidates of `first` are sorted by `order`; the rest follows as `first` has it, with
    NaN for a score where `order` reads the ranker. Equal scores keep the order of `first`, and in `first` that of the
    corpus.

    Args: `ranker_scores` belong to the best candidates of `first`, in its order; none where `order` uses no ranker.
    """
    if not order.uses_ranker:
        scores = order.scores(candidates)
        places = np.argsort(-scores, kind="stable")
        return places, scores[places]
    places = head_of(candidates, first, len(candidates))
    head = places[: len(ranker_scores)]
    scores = order.scores(candidates.at(head), np.asarray(ranker_scores, np.float64))
    sorted_head = np.argsort(-scores, kind="stable")
    rest = np.full(len(places) - len(head), np.nan)
    return np.concatenate([head[sorted_head], places[len(head) :]]), np.concatenate(
        [scores[sorted_head], rest]
    )


def head_of(candidates: Candidates, first: Order, depth: int) -> Int[np.ndarray, "ranked"]:
    """Places of the first stage's best `depth` candidates, best first: those that the ranker is to score."""
    return np.argsort(-first.scores(candidates), kind="stable")[:depth]
