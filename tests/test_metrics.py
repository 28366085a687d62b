"""Metrics: numbers worked out by hand, the two engines against each other, ties, intervals that cover."""

import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch import metrics
from jaxsearch.errors import InputError

QRELS = {"q": {"a": 4, "b": 2, "c": 1}}


@pytest.mark.parametrize("engine", ["ir_measures", "numpy"])
def test_by_hand(engine):
    run = {"q": {"c": 5.0, "x": 4.0, "a": 3.0, "b": 2.0}}
    values = metrics.rank_metrics(QRELS, run, threshold=2, engine=engine)
    log3, log5 = math.log2(3), math.log2(5)
    linear = (1 + 4 / 2 + 2 / log5) / (4 + 2 / log3 + 1 / 2)
    exponential = (1 + 15 / 2 + 3 / log5) / (15 + 3 / log3 + 1 / 2)
    assert values["ndcg@10"]["q"] == pytest.approx(linear, abs=1e-6)
    assert values["ndcg_exp@10"]["q"] == pytest.approx(exponential, abs=1e-6)
    assert values["recall@100"]["q"] == 1.0
    assert values["mrr@10"]["q"] == pytest.approx(1 / 3)
    assert values["precision@10"]["q"] == pytest.approx(0.2)
    assert values["poor_match_rate@10"]["q"] == 0.8


@pytest.mark.parametrize("engine", ["ir_measures", "numpy"])
def test_threshold_moves_relevance_but_not_gain(engine):
    run = {"q": {"b": 2.0, "a": 1.0}}
    names = ("ndcg@10", "recall@100", "mrr@10")
    two = metrics.rank_metrics(QRELS, run, threshold=2, metrics=names, engine=engine)
    three = metrics.rank_metrics(QRELS, run, threshold=3, metrics=names, engine=engine)
    assert two["ndcg@10"] == three["ndcg@10"]
    assert (two["mrr@10"]["q"], three["mrr@10"]["q"]) == (1.0, 0.5)


@pytest.mark.parametrize("engine", ["ir_measures", "numpy"])
def test_cut_off_is_respected(engine):
    run = {"q": {"x": 9.0, "y": 8.0, "a": 7.0}}
    values = metrics.rank_metrics(
        QRELS, run, threshold=2, metrics=("ndcg@2", "recall@2", "mrr@2", "mrr@3"), engine=engine
    )
    assert [values[name]["q"] for name in ("ndcg@2", "recall@2", "mrr@2")] == [0.0, 0.0, 0.0]
    assert values["mrr@3"]["q"] == pytest.approx(1 / 3)


grades = st.dictionaries(st.sampled_from("abcdefghijkl"), st.integers(0, 4), max_size=12)
scores = st.dictionaries(
    st.sampled_from("abcdefghijklmno"), st.sampled_from([-1.5, 0.0, 0.25, 1.0]), max_size=15
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["q1", "q2", "q3"]), grades, min_size=1),
    st.dictionaries(st.sampled_from(["q1", "q2", "q3", "q4"]), scores),
    st.sampled_from([2, 3]),
)
def test_engines_agree(qrels, run, threshold):
    names = ("ndcg@5", "ndcg@10", "ndcg_exp@10", "recall@10", "mrr@10", "precision@10", "poor_match_rate@10")
    first = metrics.rank_metrics(qrels, run, threshold=threshold, metrics=names, engine="ir_measures")
    second = metrics.rank_metrics(qrels, run, threshold=threshold, metrics=names, engine="numpy")
    for name in names:
        assert first[name].keys() == second[name].keys()
        for query, value in first[name].items():
            assert value == pytest.approx(second[name][query], abs=1e-6)  # measured max 2.2e-16
            assert 0.0 <= value <= 1.0 + 1e-9


@pytest.mark.parametrize("engine", ["ir_measures", "numpy"])
def test_ties_do_not_depend_on_insertion_order(engine):
    qrels = {"q": {"d03": 4, "d11": 2, "d07": 1}}
    documents = [f"d{number:02}" for number in range(15)]
    forward = {"q": dict.fromkeys(documents, 1.0)}
    backward = {"q": dict.fromkeys(reversed(documents), 1.0)}
    first = metrics.rank_metrics(qrels, forward, threshold=2, engine=engine)
    assert first == metrics.rank_metrics(qrels, backward, threshold=2, engine=engine)
    assert first["mrr@10"]["q"] == 0.25


def test_queries_without_a_possible_score_are_left_out_for_every_system():
    qrels = {"good": {"a": 2}, "weak": {"a": 1}, "nothing": {"a": 0}, "empty": {}}
    for run in ({}, {"weak": {"a": 1.0}, "empty": {"a": 1.0}}):
        values = metrics.rank_metrics(qrels, run, threshold=2)
        assert set(values["ndcg@10"]) == {"good", "weak"}
        assert set(values["recall@100"]) == set(values["mrr@10"]) == {"good"}
        assert set(values["poor_match_rate@10"]) == set(qrels)
        assert values["ndcg@10"]["good"] == 0.0


@pytest.mark.parametrize("name", ["ndcg", "ndcg@0", "map@10", "NDCG@10"])
def test_unknown_metric_is_one_message(name):
    with pytest.raises(InputError, match="unknown metric"):
        metrics.rank_metrics(QRELS, {}, threshold=2, metrics=(name,))


def test_nan_score_is_refused():
    with pytest.raises(InputError, match=r"'q'.*'a'.*NaN"):
        metrics.rank_metrics(QRELS, {"q": {"a": math.nan}}, threshold=2)


def test_restrict_keeps_queries():
    assert metrics.restrict({"q": {"a": 1, "b": 2}, "r": {"b": 3}}, {"a"}) == {"q": {"a": 1}, "r": {}}


def test_poor_match_floor_is_reached_by_the_perfect_ranking():
    rng = np.random.default_rng(0)
    qrels = {
        f"q{number}": {f"d{key:02}": int(grade) for key, grade in enumerate(rng.integers(0, 5, 20) // 2)}
        for number in range(30)
    }
    perfect = {query: {key: float(grade) for key, grade in grades.items()} for query, grades in qrels.items()}
    values = metrics.rank_metrics(qrels, perfect, threshold=2, metrics=("poor_match_rate@10",))
    mean = np.mean(list(values["poor_match_rate@10"].values()))
    assert mean == pytest.approx(metrics.poor_match_floor(qrels), abs=1e-12)


def test_empty_places_are_poor_so_that_no_short_list_is_below_the_floor():
    """Two good documents for ten places: .8 at least, however few are shown."""
    lists = ({}, {"a": 1.0}, {"a": 2.0, "c": 1.0}, {"a": 2.0, "b": 1.0})
    found = [
        metrics.rank_metrics(QRELS, {"q": shown}, threshold=2, metrics=("poor_match_rate@10",))
        for shown in lists
    ]
    assert [values["poor_match_rate@10"]["q"] for values in found] == [1.0, 0.9, 0.9, 0.8]
    assert metrics.poor_match_floor(QRELS) == 0.8


def test_where_grade_1_is_relevant_it_is_no_poor_match():
    qrels, run = {"q": {"a": 1, "b": 0}}, {"q": {"a": 2.0, "b": 1.0}}
    for threshold, rate in ((1, 0.9), (2, 1.0), (3, 1.0)):
        values = metrics.rank_metrics(qrels, run, threshold=threshold, metrics=("poor_match_rate@10",))
        assert (
            values["poor_match_rate@10"]["q"] == metrics.poor_match_floor(qrels, threshold=threshold) == rate
        )
    assert metrics.rank_metrics(QRELS, {}, threshold=2)["poor_match_rate@10"] == {"q": 1.0}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.5, 1.0, 2.0])), min_size=2, max_size=30))
def test_auc_equals_sklearn(pairs):
    labels, values = zip(*pairs, strict=True)
    if len(set(labels)) == 1:
        assert math.isnan(metrics.auc(labels, values))
    else:
        assert metrics.auc(labels, values) == pytest.approx(
            sklearn.metrics.roc_auc_score(labels, values), abs=1e-12
        )


def test_run_auc_pooled_and_per_query_differ_by_scale():
    qrels = {"q": {"a": 3, "b": 0}, "r": {"a": 3, "b": 0}, "s": {"a": 0}}
    run = {"q": {"a": 10.0, "b": 9.0}, "r": {"a": 2.0, "b": 1.0}, "s": {"a": 0.0}}
    assert metrics.run_auc(qrels, run, threshold=2) == {"auc_pooled": 5 / 6, "auc_per_query": 1.0}
    assert all(map(math.isnan, metrics.run_auc(qrels, {}, threshold=2).values()))


@pytest.mark.parametrize("weights", ["linear", "quadratic"])
def test_weighted_kappa_equals_sklearn(weights):
    rng = np.random.default_rng(1)
    first = rng.integers(0, 5, 300)
    second = np.clip(first + rng.integers(-1, 2, 300), 0, 4)
    expected = sklearn.metrics.cohen_kappa_score(first, second, weights=weights)
    assert metrics.weighted_kappa(first, second, weights) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("first", "second"), [([0, 1], [0]), ([], []), ([5], [0]), ([-1], [0]), (np.array([0.5]), [0])]
)
def test_kappa_refuses_what_are_not_grades(first, second):
    with pytest.raises(InputError, match="grades must be"):
        metrics.weighted_kappa(first, second)


def test_kappa_interval_holds_its_value_and_widens_with_groups():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(40), 10)
    first = np.repeat(rng.integers(0, 5, 40), 10)
    second = np.clip(first + np.repeat(rng.integers(-2, 3, 40), 10), 0, 4)
    single = metrics.kappa_interval(first, second, num_samples=500)
    grouped = metrics.kappa_interval(first, second, groups=groups, num_samples=500)
    assert single.value == grouped.value == metrics.weighted_kappa(first, second)
    assert grouped.low < single.low < single.value < single.high < grouped.high


def test_bootstrap_interval_covers_the_true_mean():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        sample = {str(key): float(value) for key, value in enumerate(rng.normal(0.3, 1.0, 60))}
        interval = metrics.bootstrap_ci(sample, num_samples=400, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / 200 <= 0.98  # measured .94


def test_paired_bootstrap_is_deterministic_and_signed():
    rng = np.random.default_rng(4)
    base = {str(key): float(value) for key, value in enumerate(rng.uniform(size=100))}
    better = {key: value + 0.1 + 0.05 * rng.normal() for key, value in base.items()}
    first = metrics.paired_bootstrap(better, base)
    assert first == metrics.paired_bootstrap(better, dict(reversed(base.items())))
    assert 0.08 < first.low < first.value < first.high < 0.12
    mirrored = metrics.paired_bootstrap(base, better)
    assert mirrored.value == pytest.approx(-first.value)
    assert mirrored.high < 0
    with pytest.raises(InputError, match="same queries"):
        metrics.paired_bootstrap(base, {"0": 1.0})
    with pytest.raises(InputError, match="no query"):
        metrics.paired_bootstrap({}, {})
