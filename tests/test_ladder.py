"""Every rung of ours on tiny models, what the ladder refuses; torch's rungs: `tests/parity/test_parity_ladder.py`."""

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from jaxsearch.data.prompts import PromptTokens
from jaxsearch.errors import InputError
from jaxsearch.nn.pruning import keep_layers
from jaxsearch.ranker import load_ranker, new_ranker, save_ranker
from tests.tiny_bundle import write_parts
from tests.tiny_collection import write_collection
from train import ladder, ways
from train.inputs import load_data
from train.rungs import Rung, Stage, our_rungs, shared_prefix_rungs

OURS = ["one by one", "batches", "shared prefix"]
OTHERS = [
    "pruned: cut",
    "shared prefix, bfloat16",
    "pruned: cut, bfloat16",
    "shared prefix, short view",
    "encoder alone",
]
DOCUMENTS = ["bread0", "code1", "iron0"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("ladder")
    parts = write_parts(root)
    tiny = load_ranker(parts["ranker"])
    whole = new_ranker(tiny.decoder, tiny.prompt, view="full")
    save_ranker(root / "whole" / "model", whole, trained={})
    cut = new_ranker(keep_layers(tiny.decoder, (0,)), tiny.prompt, view="full")
    save_ranker(root / "cut" / "model", cut, trained={})
    return ladder.LadderConfig(
        ranker=str(root / "whole" / "model"),
        retriever=str(parts["encoder"]),
        encoder=str(parts["encoder"]),
        pruned=(str(root / "cut" / "model"),),
        short_view="short",
        collection=str(write_collection(root / "data")),
        vertical=str(parts["vertical"]),
        dtype="float32",
        num_queries=3,
        depth=8,
        timed_queries=2,
        window_seconds=0.2,
        has_memory=False,
    )


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    """As where nothing but the core is installed; the tiny tokenizer is none that sentence-transformers takes."""
    monkeypatch.setattr(ladder, "missing_libraries", lambda: list(ways.LIBRARIES))


def test_every_rung_is_measured(config, tmp_path):
    ladder.main(config, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [*OURS, *OTHERS]
    assert "torch" in report["left_out"]
    same = [row for row in rows.values() if "largest_difference" in row]
    assert [row["name"] for row in same] == OURS
    for row in same:
        assert row["largest_difference"] <= ways.AGREEMENT["float32"]
        assert row["ndcg@10"] == rows["one by one"]["ndcg@10"]
        assert row["retained"] == 1
    assert rows["shared prefix"]["computed_tokens"] < rows["batches"]["computed_tokens"]
    assert rows["shared prefix"]["computed_tokens"] < rows["one by one"]["computed_tokens"]
    assert all(0 <= row["padding"] < 1 for row in rows.values() if "padding" in row)
    assert "padding" not in rows["encoder alone"]
    slowest = max(row["alone_ms"]["p50"] for row in rows.values())
    assert report["slo_ms"] == pytest.approx(config.slo_factor * slowest)
    for row in rows.values():
        free, held = row["items_per_second"], row["simulated"]
        assert free["minimum"] <= free["median"] <= free["maximum"]
        assert held["items_per_second"] == pytest.approx(report["depth"] * held["requests_per_second"])
        assert 0 <= held["load"] <= ladder.MOST_LOAD + 1e-9
        if held["requests_per_second"]:
            assert row["measured"]["num_errors"] == 0
    text = (tmp_path / "report.md").read_text()
    assert all(text.count(f"| {name} |") == 2 for name in rows)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_rate_is_the_one_that_a_queue_of_equal_requests_allows():
    """M/D/1: P(wait <= 2 services) = (1 - load) (e^(2 load) - load e^load), which is 0.99 at a load of 0.32."""
    load = 0.1 * ladder.simulated_rate([0.1] * 5, 0.3 + 1e-9, seed=0)
    assert load == pytest.approx(0.32, abs=0.02)  # measured 0.317
    assert 0.1 * ladder.simulated_rate([0.1] * 5, 100.0, seed=0) == pytest.approx(ladder.MOST_LOAD)
    assert ladder.simulated_rate([0.1] * 5, 0.05, seed=0) == 0


def sleeping(name, seconds):
    """A rung whose calls take so long, one after another."""
    left = iter(seconds)

    def score(request):
        time.sleep(next(left))
        return np.zeros(len(request.documents))

    request = ways.Request("query", ["document"], PromptTokens((1,), [[2]], [False]))
    return Rung(name, "ours", lambda: ways.Way(score), [request])


def test_a_rung_holds_its_rate_where_its_p99_is_within_the_slo(config):
    timed = itertools.repeat(0.1, config.repeats)
    rungs = [
        sleeping("steady", itertools.repeat(0.1)),
        sleeping("tired under load", itertools.chain(timed, [5.0], itertools.repeat(0.1))),
    ]
    slo, found = ladder.speed(dataclasses.replace(config, slo_factor=25), rungs)
    assert 2.5 <= slo < 5.0
    assert {name: row["holds"] for name, row in found.items()} == {"steady": True, "tired under load": False}
    _, found = ladder.speed(dataclasses.replace(config, slo_factor=0.5), rungs[:1])
    assert not found["steady"]["holds"]  # not even a request alone
    assert "measured" not in found["steady"]


def test_memory_is_measured_where_it_is_asked_for(config, tmp_path):
    wanted = {"dtype": "bfloat16", "pruned": (), "short_view": "", "encoder": "", "has_memory": True}
    ladder.main(dataclasses.replace(config, **wanted), tmp_path)
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == OURS
    assert all(2**20 < row["memory_bytes"] < 2**30 for row in rows)


def test_different_scores_are_refused(config):
    collection, vertical = load_data(config, view=config.view)
    queries = collection.split("test")
    stage = Stage(
        collection, vertical, queries, {query.id: dict.fromkeys(DOCUMENTS, 0.0) for query in queries}
    )
    whole = our_rungs(stage, config.ranker, "float32")
    (cut,) = shared_prefix_rungs(stage, {"cut": config.pruned[0]}, "pruned", "float32")
    assert list(ladder.quality(stage, [*whole, cut], "float32")) == [*OURS, "cut"]
    with pytest.raises(InputError, match=r"scores differ.*'cut'"):  # measured 0.0094
        ladder.quality(stage, [*whole, dataclasses.replace(cut, is_same=True)], "float32")
    same = {("float32", "a"): np.zeros(2), ("float32", "b"): np.array([0.0, np.nan])}
    with pytest.raises(InputError, match="scores differ"):
        ways.check_agreement(same, "a")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ranker": "nowhere"}, "no such model folder"),
        ({"short_view": "full"}, "reads 'full' anyway"),
        ({"short_view": "none"}, "has no view 'none'"),
        ({"pruned": ("a/model", "b/a")}, "names of their own"),
    ],
)
def test_a_wrong_config_is_one_sentence(config, tmp_path, changes, told):
    with pytest.raises(InputError, match=told):
        ladder.main(dataclasses.replace(config, **changes), tmp_path)
