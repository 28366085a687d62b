"""What is served: never below one of its parts, and over HTTP what the library answers in one process."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxsearch.bundle import load_bundle
from jaxsearch.data.sources import load_collection
from jaxsearch.metrics import rank_metrics
from tests.live_server import running, wait_until_ready
from tests.tiny_bundle import write_parts
from tests.tiny_collection import write_words
from train import evaluate, export, index
from train.systems import order_runs, served_run

PARTS = ("bm25", "encoder", "sum")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> export.ExportConfig:
    root = tmp_path_factory.mktemp("parts")
    folders = write_parts(root)
    collection = str(write_words(root / "collection", num_queries=72))
    made_of = {key: str(folders[key]) for key in ("encoder", "vertical")} | {"collection": collection}
    index.main(index.IndexConfig(**made_of), root)
    made_of |= {"ranker": str(folders["ranker"]), "index": str(root / "index")}
    return export.ExportConfig(rank_depth=6, max_batch_tokens=256, **made_of)


@pytest.fixture(scope="module")
def bundle(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("export")
    export.main(config, workdir)
    return load_bundle(workdir / "bundle")


def shortfall(bundle, config) -> float:
    """NDCG@10 on test queries: the best part's minus that of what is served."""
    collection = load_collection(config.collection)
    queries = collection.split("test")
    qrels = {query.id: collection.qrels[query.id] for query in queries}

    def value(run):
        return np.mean([*rank_metrics(qrels, run, threshold=2, metrics=("ndcg@10",))["ndcg@10"].values()])

    parts = order_runs(bundle.searcher, queries, PARTS)
    return max(map(value, parts.values())) - value(served_run(bundle, queries))


def test_what_is_served_is_not_below_one_of_its_parts(bundle, config):
    assert "which has not earned its place" in bundle.orders.reason
    assert shortfall(bundle, config) <= 0.005  # measured 0


@pytest.mark.parametrize("order", ["rrf", "ranker"])
def test_and_that_is_noticed_where_it_is(config, tmp_path, order):
    export.main(dataclasses.replace(config, order=order, allow_worse=True), tmp_path)
    assert shortfall(load_bundle(tmp_path / "bundle"), config) > 0.005  # measured .019 and .07


def test_the_server_answers_what_the_library_answers(bundle, config, tmp_path):
    with running(bundle.directory, tmp_path / "log") as (_, client):
        wait_until_ready(client)
        for query in ("bake bread", "write", "zzz"):
            for order in bundle.orders.orders:
                options = {
                    "order": order,
                    "filter": {"field": "title", "gt": "c"},
                    "explain": True,
                    "top_k": 40,
                }
                served = client.post("/v1/search", json={"query": query, **options}).json()
                ours = dataclasses.asdict(bundle.search(query, **options))
                assert served["order"] == ours["order"] == order
                assert [row["id"] for row in served["results"]] == [row["id"] for row in ours["results"]]
                # measured 0: alone in its launches a request is computed by the same programs
                jax.tree.map(assert_close, served["results"], json.loads(json.dumps(ours["results"])))
                assert {name: served[name] for name in ("total", "starved", "depth_used")} == {
                    name: ours[name] for name in ("total", "starved", "depth_used")
                }
        compared = evaluate.EvaluateConfig(
            bundle=str(bundle.directory),
            server=str(client.base_url),
            collection=config.collection,
            vertical=config.vertical,
            systems=("sum", "served"),
            num_samples=100,
        )
        evaluate.main(compared, tmp_path)
    means = json.loads((tmp_path / "report.json").read_text())["groups"][0]["columns"]["all"]["means"]
    assert means["server"] == means["served"]


def assert_close(left, right):
    assert left == (pytest.approx(right, rel=0, abs=1e-6) if isinstance(right, float) else right)
