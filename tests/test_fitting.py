"""Orders fitted on graded queries: the better signal gets the weight, and the ranker only serves where it helps."""

import dataclasses

import numpy as np
import pytest

from jaxsearch.errors import InputError
from jaxsearch.files import write_json
from jaxsearch.metrics import Interval
from jaxsearch.search.candidates import RETRIEVE_DEPTH, Candidates
from jaxsearch.search.fitting import (
    LEAST_QUERIES,
    GradedCandidates,
    NothingToFitError,
    WorseOrderError,
    choose,
    fit_orders,
    fit_ranked,
    fit_sum,
    held_out_error,
)
from jaxsearch.search.orders import NAMES, UNFITTED, Order, Orders, arrange, head_of

NUM_QUERIES, NUM_DOCUMENTS = 40, 30
IDS = [f"d{number:02}" for number in range(NUM_DOCUMENTS)]


def graded(*, similarity: float, bm25: float, seed: int = 0) -> GradedCandidates:
    """Queries whose signals are the grades with noise of these sizes."""
    rng = np.random.default_rng(seed)
    candidates, qrels = {}, {}
    for number in range(NUM_QUERIES):
        grades = rng.integers(0, 5, NUM_DOCUMENTS)
        qrels[f"q{number:02}"] = {key: int(grade) for key, grade in zip(IDS, grades, strict=True)}
        signals = {
            "similarity": grades / 4 + similarity * rng.normal(size=NUM_DOCUMENTS),
            "bm25": grades / 4 + bm25 * rng.normal(size=NUM_DOCUMENTS),
        }
        ranks = {
            source: np.argsort(np.argsort(-signals[signal])) + 1
            for source, signal in (("embedding", "similarity"), ("bm25", "bm25"))
        }
        candidates[f"q{number:02}"] = Candidates(np.arange(NUM_DOCUMENTS), signals, ranks)
    return GradedCandidates(candidates, IDS, qrels, 2)


def ranker_scores(
    data: GradedCandidates, first: Order, noise: float, depth: int = 20
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(9)
    scores = {}
    for query, found in data.candidates.items():
        head = found.at(head_of(found, first, depth))
        grades = np.array([data.qrels[query][IDS[position]] for position in head.positions])
        scores[query] = 10 * (grades / 4 + noise * rng.normal(size=len(head))) - 5
    return scores


def mean(values: dict[str, float]) -> float:
    return float(np.mean(list(values.values())))


def test_the_sum_leans_on_the_better_signal_and_gains_from_both():
    assert fit_sum(graded(similarity=0.3, bm25=100.0)).weights.get("bm25", 0.0) <= 0.2
    assert fit_sum(graded(similarity=100.0, bm25=0.3)).weights["bm25"] >= 0.8
    data = graded(similarity=0.3, bm25=0.3)
    fitted = fit_sum(data)
    assert 0.2 <= fitted.weights["bm25"] <= 0.8
    alone = [mean(data.values(order)) for order in UNFITTED[:2]]
    assert mean(data.values(fitted)) > max(alone)
    equal = GradedCandidates(
        {
            query: Candidates(
                found.positions, dict.fromkeys(found.signals, found.signals["bm25"]), found.ranks
            )
            for query, found in data.candidates.items()
        },
        IDS,
        data.qrels,
        2,
    )
    assert fit_sum(equal).weights == {"similarity": 0.5, "bm25": 0.5}


def test_no_query_is_measured_with_a_share_that_it_chose():
    """A ranker of pure noise: chosen and measured on the same queries its share would seem to cost nothing."""
    lucky, crossed = [], []
    for seed in range(6):
        data = graded(similarity=100.0, bm25=100.0, seed=seed)
        first = fit_sum(data)
        scores = ranker_scores(data, first, 100.0)
        fitted = fit_ranked(data, first, scores)
        lucky.append(mean(data.values(fitted.order, first, scores)))
        crossed.append(mean(fitted.values))
    assert np.mean(crossed) < np.mean(lucky) - 0.003  # measured .0099


@pytest.mark.parametrize("num_queries", [1, 3, LEAST_QUERIES - 1, NUM_QUERIES])
def test_a_ranker_that_repeats_the_sum_is_never_served(num_queries):
    for seed in range(5):
        data = graded(similarity=1.0, bm25=1.0, seed=seed)
        data = data.of(list(data.candidates)[:num_queries])
        first = fit_sum(data)
        echo = {
            query: first.scores(found.at(head_of(found, first, 20)))
            for query, found in data.candidates.items()
        }
        orders = fit_orders(data, first, echo, rank_depth=20)
        assert orders.default == "sum"
        assert ("too few to tell" in orders.reason) == (num_queries < LEAST_QUERIES)


def test_queries_without_relevant_documents_leave_nothing_to_fit():
    data = graded(similarity=1.0, bm25=1.0)
    with pytest.raises(NothingToFitError, match="no validation query has a value"):
        fit_sum(GradedCandidates(data.candidates, IDS, {query: {} for query in data.qrels}, 2))


def test_an_order_is_measured_on_what_its_sources_find():
    """A search by words alone never lists a document without one of them, so that its measure must not either."""
    found = Candidates(
        np.array([0, 1]),
        {"similarity": np.array([0.5, 0.9]), "bm25": np.array([1.0, 0.0])},
        {"embedding": np.array([2, 1]), "bm25": np.array([1, 0])},
    )
    data = GradedCandidates({"q": found}, IDS, {"q": {"d01": 4}}, 2)
    assert data.values(UNFITTED[0]) == {"q": 0.0}
    assert data.values(UNFITTED[1]) == {"q": 1.0}


def test_a_good_ranker_is_served_and_a_useless_one_is_not():
    data = graded(similarity=0.4, bm25=0.4)
    fitted = fit_sum(data)
    good = fit_orders(data, fitted, ranker_scores(data, fitted, 0.1), rank_depth=20)
    assert good[good.default].uses_ranker
    assert good.reason.startswith(f"Served: {good.default}. The ranker earns its place")
    assert set(good.orders) == set(NAMES)
    assert good.retrieval.name in ("sum", "rrf")
    scores = ranker_scores(data, fitted, 100.0)
    useless = fit_orders(data, fitted, scores, rank_depth=20)
    assert not useless[useless.default].uses_ranker
    assert "without the ranker, which has not earned its place" in useless.reason
    value = {name: order.validation.value for name, order in useless.orders.items()}
    assert useless.default == "sum"
    assert value["sum"] > max(value["bm25"], value["encoder"])
    assert value["ranker"] < value[useless.default] - 0.1


def test_an_order_that_is_worse_has_to_be_wanted():
    data = graded(similarity=0.4, bm25=0.4)
    fitted = fit_sum(data)
    scores = ranker_scores(data, fitted, 100.0)
    with pytest.raises(WorseOrderError, match=r"order ranker reaches NDCG@10 \.?\d.* search would be worse"):
        fit_orders(data, fitted, scores, rank_depth=20, wanted="ranker")
    with pytest.raises(InputError, match="unknown order 'other'; there are bm25, encoder"):
        fit_orders(data, fitted, scores, rank_depth=20, wanted="other")
    forced = fit_orders(data, fitted, scores, rank_depth=20, wanted="ranker", allow_worse=True)
    assert forced.default == "ranker"
    assert "as it was asked for" in forced.reason
    assert forced.retrieval.name in ("sum", "rrf")
    assert fit_orders(data, fitted, scores, rank_depth=20, allow_worse=True).ranked.uses_ranker
    best = fit_orders(data, fitted, scores, rank_depth=20)
    assert fit_orders(data, fitted, scores, rank_depth=20, wanted=best.default).reason == best.reason


@pytest.mark.parametrize(
    "other", [Order("ranker", {"ranker": 1.0}), Order("rrf"), Order("encoder", {"similarity": 1.0})]
)
def test_another_order_must_beat_the_sum_by_more_than_chance(other):
    neither = Order("ranker", {"ranker": 1.0})
    orders = {"sum": Order("sum", {"bm25": 1.0}), neither.name: neither, other.name: other}
    rng = np.random.default_rng(0)
    plain = {f"q{number}": float(value) for number, value in enumerate(rng.random(50))}
    by_chance = {
        query: value + 0.01 * (1 if number % 2 else -0.9)
        for number, (query, value) in enumerate(plain.items())
    }
    assert mean(by_chance) > mean(plain)
    low = dict.fromkeys(plain, 0.0)
    assert choose({"sum": plain, "ranker": low, other.name: by_chance}, orders)[1] == "sum"
    surely = {query: value + 0.01 for query, value in plain.items()}
    assert choose({"sum": plain, "ranker": low, other.name: surely}, orders)[1] == other.name


def test_the_rankers_share_does_not_depend_on_the_scale_of_its_scores():
    data = graded(similarity=0.4, bm25=0.4)
    first = fit_sum(data)
    scores = ranker_scores(data, first, 0.3)
    one = fit_ranked(data, first, scores)
    other = fit_ranked(data, first, {query: 7 * values + 3 for query, values in scores.items()})
    assert one.values == other.values
    assert one.order.weights["ranker"] == pytest.approx(7 * other.order.weights["ranker"])


def test_calibrations_are_probabilities_that_hold_on_other_queries():
    data = graded(similarity=0.3, bm25=0.3)
    fitted = fit_sum(data)
    scores = ranker_scores(data, fitted, 0.3)
    orders = fit_orders(data, fitted, scores, rank_depth=20)
    for order in orders.orders.values():
        assert order.calibration is not None
        assert 0 <= min(order.calibration.y) <= max(order.calibration.y) <= 1
        error = held_out_error(data, order, fitted, scores if order.uses_ranker else None)
        assert error is not None
        assert error < 0.1  # measured at most .062


def test_orders_are_read_back_as_they_were_written(tmp_path):
    data = graded(similarity=0.4, bm25=0.4)
    fitted = fit_sum(data)
    orders = fit_orders(data, fitted, ranker_scores(data, fitted, 0.3), rank_depth=20)
    write_json(tmp_path / "orders.json", orders.to_json())
    assert Orders.load(tmp_path / "orders.json") == orders


def test_arrange_ranks_the_head_and_leaves_the_rest_to_the_first_stage():
    signals = {"similarity": np.array([0.9, 0.8, 0.7, 0.6]), "bm25": np.array([0.0, 1.0, 0.0, 0.5])}
    ranks = {"embedding": np.array([1, 2, 3, 4]), "bm25": np.array([0, 1, 0, 2])}
    found = Candidates(np.array([2, 5, 7, 11]), signals, ranks)
    first, ranker = Order("encoder", {"similarity": 1.0}), Order("ranker", {"ranker": 1.0})
    places, scores = arrange(found, ranker, first, np.array([-1.0, 3.0]))
    assert places.tolist() == [1, 0, 2, 3]
    assert scores[:2].tolist() == [3.0, -1.0]
    assert np.isnan(scores[2:]).all()
    tied, _ = arrange(found, ranker, first, np.array([1.0, 1.0, 1.0]))
    assert tied.tolist() == [0, 1, 2, 3]
    places, scores = arrange(found, Order("rrf"), Order("rrf"))
    assert places.tolist() == [1, 3, 0, 2]
    assert scores[0] == pytest.approx(1 / 62 + 1 / 61)
    both = Order("sum+ranker", {"similarity": 1.0, "ranker": 0.1})
    assert arrange(found, both, first, np.array([0.0, 3.0]))[1][0] == pytest.approx(1.1)


def test_the_best_order_of_each_sort_is_found_without_measurements_too():
    orders = Orders.unfitted("there were no grades", rank_depth=7)
    assert "there were no grades, so that nothing could be fitted" in orders.reason
    assert (orders.default, orders.retrieval.name, orders.ranked.name) == ("rrf", "rrf", "ranker")
    assert orders.first_stage.name == "rrf"
    measured = {
        **orders.orders,
        "bm25": Order("bm25", {"bm25": 1.0}, Interval(0.5, 0.4, 0.6)),
        "ranker": Order("ranker", {"ranker": 1.0}, Interval(0.6, 0.5, 0.7)),
        "sum+ranker": Order("sum+ranker", {"bm25": 1.0, "ranker": 1.0}, Interval(0.7, 0.6, 0.8)),
    }
    orders = Orders(measured, "bm25", "", plain="bm25")
    assert (orders.retrieval.name, orders.ranked.name) == ("bm25", "sum+ranker")
    forced = Orders(measured, "ranker", "", plain="bm25")
    assert (forced.retrieval.name, forced.ranked.name) == ("bm25", "ranker")


def test_an_order_is_calibrated_on_what_a_search_lists():
    """Both sources together found more than that."""
    positions = np.arange(2 * RETRIEVE_DEPTH)
    similarity = np.linspace(1.0, 0.0, len(positions))
    signals = {"similarity": similarity, "bm25": similarity}
    ranks = {"embedding": positions + 1, "bm25": positions + 1}
    ids = [f"d{position:03}" for position in positions]
    qrels = {"q": {ids[0]: 4, ids[-1]: 4}}
    graded = GradedCandidates({"q": Candidates(positions, signals, ranks)}, ids, qrels, 2)
    first = Order("sum", {"similarity": 0.5, "bm25": 0.5})
    for order, ranked in ((first, None), (Order("ranker", {"ranker": 1.0}), {"q": np.zeros(150)})):
        scores, is_relevant = graded.pairs(["q"], order, first, ranked)
        assert len(scores) == RETRIEVE_DEPTH
        assert is_relevant.sum() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orders": {"bm25": UNFITTED[0]}}, "the order 'encoder' is missing"),
        ({"default": "best"}, "unknown order 'best'"),
        ({"plain": "sum"}, "unknown order 'sum'"),
        (
            {"orders": {**Orders.unfitted().orders, "sum": Order("sum", {"age": 1.0})}},
            "order 'sum' .* weighs more than bm25, ranker, similarity",
        ),
        ({"orders": {**Orders.unfitted().orders, "sum": UNFITTED[0]}}, "order 'sum' has another name inside"),
    ],
)
def test_orders_that_could_not_be_served_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(Orders.unfitted(), **changes)
