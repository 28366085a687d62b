"""The evaluation table: its numbers by hand, its columns, and the whole launcher over tiny real models."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import rich.console

from jaxsearch.bundle import load_bundle
from jaxsearch.data.records import Collection, Document, Query
from jaxsearch.errors import InputError
from jaxsearch.judge import save_judge
from jaxsearch.metrics import Interval
from jaxsearch.retrieval.exact import ExactIndex
from jaxsearch.retrieval.lexical import Bm25Index
from jaxsearch.retrieval.scann import ScannIndex
from jaxsearch.search.orders import Orders
from tests.tiny_bundle import relist, write_parts
from tests.tiny_collection import tiny_judge, write_words
from train import evaluate, export, index, plots, report, report_stages
from train.evaluate import EvaluateConfig


def ranking(*documents):
    return {document: float(-place) for place, document in enumerate(documents)}


QRELS = {"q1": {"a": 4, "u": 2}, "q2": {"b": 3}, "q3": {}}
GOOD = {"q1": ranking("a", "u", "b"), "q2": ranking("b", "a", "u"), "q3": ranking("a", "b", "u")}
POOR = {"q1": ranking("b", "u", "a"), "q2": ranking("u", "a", "b"), "q3": ranking("u", "b", "a")}
COLUMNS = {"all": {"a", "b", "u"}, "seen": {"a", "b"}, "unseen": {"u"}}


def group(**changes):
    options = {"threshold": 2, "baseline": "poor", "num_samples": 200} | changes
    return report.evaluate_group("test", {"poor": POOR, "good": GOOD}, QRELS, COLUMNS, **options)


def test_columns_restrict_runs_and_grades_to_their_documents():
    columns = group().columns
    assert columns["all"].means["good"]["ndcg@10"] == pytest.approx(1.0)
    discount = 1 / np.log2(3)
    by_hand = ((2 * discount + 4 / 2) / (4 + 2 * discount) + 1 / 2) / 2
    assert columns["all"].means["poor"]["ndcg@10"] == pytest.approx(by_hand, abs=1e-6)
    # without u, q1 has (b, a) with a graded 4, q2 has (a, b) with b graded 3: both second of two
    assert columns["seen"].means["poor"]["ndcg@10"] == pytest.approx(discount, abs=1e-6)
    assert columns["seen"].num_queries["ndcg@10"] == 2
    assert columns["unseen"].num_queries["ndcg@10"] == 1
    assert columns["unseen"].means["poor"]["ndcg@10"] == pytest.approx(1.0)
    assert columns["unseen"].num_queries["poor_match_rate@10"] == 3


def test_comparisons_are_paired_with_the_named_baseline():
    comparison = group().columns["all"].comparisons[0]
    assert (comparison.system, comparison.against) == ("good", "poor")
    assert comparison.difference.value == pytest.approx(1 - group().columns["all"].means["poor"]["ndcg@10"])
    assert comparison.is_significant
    same = report.evaluate_group("x", {"a": GOOD, "b": GOOD}, QRELS, COLUMNS, threshold=2, baseline="a")
    assert same.columns["all"].comparisons[0].difference == (0.0, 0.0, 0.0)
    assert not same.columns["all"].comparisons[0].is_significant


@pytest.mark.parametrize(
    ("difference", "shown"),
    [
        ((2e-4, 1e-4, 4e-4), "+.000 [+.000, +.000]"),
        ((0.01, 1e-4, 0.02), "+.010 [+.000, +.020] *"),
        ((-1e-4, -0.01, 0.01), "+.000 [-.010, +.010]"),
        ((-0.02, -0.03, -1e-4), "-.020 [-.030, +.000] *"),
    ],
)
def test_a_star_is_for_an_interval_that_excludes_0_and_a_difference_that_can_be_seen(difference, shown):
    result = group()
    found = report.Comparison("good", "poor", Interval(*difference))
    column = dataclasses.replace(result.columns["all"], comparisons=[found])
    _, rows = report.comparison_rows(dataclasses.replace(result, columns={"all": column}))
    assert rows == [["good − poor", shown]]


def test_what_is_served_is_compared_with_everything():
    systems = ["bm25:full", "minilm", "encoder", "sum", "judge", "ranker", "served"]
    pairs = report.comparison_pairs(systems, "sum")
    assert len(pairs) == len(set(pairs))
    assert {("served", system) for system in systems[:-1]} <= set(pairs)
    assert {(system, "sum") for system in systems} - {("sum", "sum")} <= set(pairs)


def test_the_ceiling_of_a_first_stage_is_the_best_order_of_what_it_found():
    qrels = {"q": {"a": 4, "b": 2, "c": 3}}
    run = {"q": ranking(*[f"x{i}" for i in range(25)], "a", "b")}
    row = report_stages.first_stage_rows({"one": run}, qrels, threshold=2)[0]
    assert (row["recall@20"], row["ceiling@20"]) == (0, 0)
    assert row["recall@40"] == pytest.approx(2 / 3)
    by_hand = (4 + 2 / np.log2(3)) / (4 + 3 / np.log2(3) + 2 / 2)
    assert row["ceiling@40"] == row["ceiling@100"] == pytest.approx(by_hand)


def test_systems_by_kind_of_query():
    documents = {key: Document(key, {"title": key}) for key in "abu"}
    queries = {key: Query(key, "?") for key in QRELS}
    kinds = {"q1": "role", "q2": "place"}
    collection = Collection("x", queries, documents, QRELS, {}, query_kinds=kinds)
    rows = report_stages.kind_rows({"good": GOOD, "poor": POOR}, QRELS, collection, threshold=2)
    assert [(row["kind"], row["queries"]) for row in rows] == [("place", 1), ("role", 1)]
    assert rows[0]["systems"]["good"]["value"] == pytest.approx(1.0)
    text = report_stages.stage_markdown({"kinds": rows})
    assert "| NDCG@10 by kind of query | place (1) | role (1) |" in text
    assert (
        report_stages.kind_rows(
            {"good": GOOD}, QRELS, dataclasses.replace(collection, query_kinds={}), threshold=2
        )
        == []
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"poor": POOR}, {}), "no queries"),
        (({"poor": {"q1": {}}}, QRELS), "lacks 2 queries, the first 'q2'"),
        (({"good": GOOD}, QRELS), "baseline 'poor'"),
        (({"poor": POOR}, {"q1": {}, "q2": {}}), "no query has a graded document among the all"),
    ],
)
def test_group_refuses_what_cannot_be_compared(arguments, message):
    with pytest.raises(InputError, match=message):
        report.evaluate_group("test", *arguments, COLUMNS, threshold=2, baseline="poor")


def test_overlay_puts_scored_documents_first_and_keeps_the_tail():
    base = {"q": {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}}
    merged = report.overlay(base, {"q": {"c": -9.0, "a": -10.0}})
    assert sorted(merged["q"], key=merged["q"].get, reverse=True) == ["c", "a", "b", "d"]
    assert report.top(base, 2) == {"q": {"a": 0.4, "b": 0.3}}
    assert report.overlay(base, {}) == {"q": {"a": 0.0, "b": -1.0, "c": -2.0, "d": -3.0}}


def test_document_columns_of_a_collection_without_unseen_documents():
    documents = {"a": Document("a", {"title": "A"}), "b": Document("b", {"title": "B"})}
    collection = Collection("x", {"q": Query("q", "?")}, documents, {}, {"q": "test"})
    assert report.document_columns(collection) == {"all": {"a", "b"}}
    split = dataclasses.replace(collection, unseen_documents=frozenset("b"))
    assert report.document_columns(split) == {"all": {"a", "b"}, "seen": {"a"}, "unseen": {"b"}}


def test_rendered_tables_state_the_numbers():
    result = group()
    text = report.to_markdown("Title", [result], ["grades are derived"])
    assert "* grades are derived" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in lines[:5]} == {15}
    assert "| good | 1.000 | 1.000 | 1.000 |" in text
    assert "| perfect ranking |" in text
    assert "| good − poor | +." in text
    stream = io.StringIO()
    console = rich.console.Console(file=stream, width=80)
    for table in report.to_rich(result):
        console.print(table)
    shown = stream.getvalue()
    assert "unseen documents" in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_kappa_that_rounds_to_0_has_no_sign():
    documents = {"a": Document("a", {"title": "A"})}
    collection = Collection("x", {"q": Query("q", "?")}, documents, {}, {"q": "test"})
    judge = {"weighted_kappa": (-1e-4, -2e-4, 1e-4), "num_pairs": 3}
    notes = evaluate.notes_of(EvaluateConfig(), collection, 2, {"judge": judge, "rank_depth": 3})
    assert "weighted kappa 0.000 [0.000, 0.000], 3 pairs" in notes[-1]


def test_json_is_strict_and_complete():
    result = group()
    stated = report.to_json([result], {"text": ["derived"]})
    parsed = json.loads(json.dumps(stated, allow_nan=False))
    column = parsed["groups"][0]["columns"]["all"]
    assert column["means"]["good"]["ndcg@10"] == pytest.approx(1.0)
    assert set(column["headline"]["good"]) == {"value", "low", "high"}
    assert column["comparisons"][0]["difference"]["low"] > 0
    without_relevant = report.evaluate_group(
        "x", {"poor": POOR}, {"q1": {"a": 1}}, {"all": {"a"}}, threshold=2, baseline="poor", num_samples=10
    )
    assert (
        report.to_json([without_relevant], {})["groups"][0]["columns"]["all"]["means"]["poor"]["mrr@10"]
        is None
    )


def test_plot_has_a_panel_per_column_and_group(tmp_path):
    plots.plot(tmp_path / "one.png", "T", [group()], baseline="poor", footer="a footer " * 40)
    plots.plot(tmp_path / "two.png", "T", [group(), group()], baseline="poor", footer="")
    sizes = [_png_size(tmp_path / name) for name in ("one.png", "two.png")]
    assert sizes[0][0] == pytest.approx(sizes[1][0], rel=0.02)
    assert sizes[1][1] > 1.3 * sizes[0][1]
    assert 1000 < sizes[0][0] < 2600


def _png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_draw_is_fixed_by_its_seed_and_keeps_order():
    queries = [Query(str(number), "") for number in range(50)]
    first = evaluate.draw(queries, 10, 0)
    assert first == evaluate.draw(queries, 10, 0) != evaluate.draw(queries, 10, 1)
    assert [int(query.id) for query in first] == sorted(int(query.id) for query in first)
    assert evaluate.draw(queries, 0, 0) == evaluate.draw(queries, 99, 0) == queries


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Tiny models, a vertical, and a collection in files: 24 queries, 40 documents."""
    root = tmp_path_factory.mktemp("parts")
    folders = write_parts(root)
    save_judge(root / "judge", tiny_judge(folders), trained={})
    collection = write_words(root / "collection")
    made_of = {key: str(folders[key]) for key in ("encoder", "vertical")} | {"collection": str(collection)}
    index.main(index.IndexConfig(**made_of), root)
    made_of |= {"ranker": str(folders["ranker"]), "index": str(root / "index")}
    export.main(export.ExportConfig(rank_depth=6, max_batch_tokens=256, **made_of), root)
    return {**folders, "judge": root / "judge", "collection": collection, "bundle": root / "bundle"}


def parts_version(parts, kind):
    return json.loads((parts[kind] / "jaxsearch.json").read_text())["version"]


def config_of(parts, **changes):
    options = {
        "bundle": str(parts["bundle"]),
        "judge": str(parts["judge"]),
        "retriever": str(parts["encoder"]),
        "other_rankers": (f"twin={parts['ranker']}",),
        "collection": str(parts["collection"]),
        "vertical": str(parts["vertical"]),
        "judge_queries": 5,
        "num_samples": 100,
    }
    return EvaluateConfig(**options | changes)


def test_launcher_writes_the_table_of_every_system(parts, tmp_path, capsys):
    evaluate.main(config_of(parts), tmp_path)
    stated = json.loads((tmp_path / "report.json").read_text())
    everything, subset = stated["groups"]
    systems = [
        "bm25:short",
        "bm25:full",
        "minilm",
        "encoder",
        "rrf",
        "sum",
        "ranker",
        "sum+ranker",
        "served",
        "twin",
    ]
    assert (everything["num_queries"], subset["num_queries"]) == (16, 5)
    means, own = (part["columns"]["all"]["means"] for part in (everything, subset))
    assert list(means) == systems
    assert set(own) == {*systems, "judge"}
    # grades count shared words of the titles, so words alone find them all, and random weights do not
    assert means["bm25:short"]["ndcg@10"] > 0.95 > means["ranker"]["ndcg@10"]
    assert means["encoder"] == pytest.approx(means["minilm"])
    assert means["twin"] == means["ranker"]
    assert means["ranker"]["recall@100"] == means["sum"]["recall@100"]
    notes = stated["notes"]
    assert means["served"] == means["bm25:short" if notes["order"] == "bm25" else notes["order"]]
    assert (
        means["served"]["ndcg@10"]
        >= max(means[part]["ndcg@10"] for part in ("bm25:short", "encoder", "sum")) - 0.005
    )
    stages = {row["system"]: row for row in notes["first_stage"]}
    assert set(stages) == {"bm25:short", "bm25:full", "minilm", "encoder", "rrf", "sum"}
    assert all(
        row["ceiling@40"] >= row["ceiling@20"] >= means[name]["ndcg@10"] for name, row in stages.items()
    )
    assert [(row["kind"], row["queries"]) for row in notes["kinds"]] == [("even", 8), ("odd", 8)]
    assert notes["data"] in notes["text"][0]
    assert notes["models"] == {
        "encoder": parts_version(parts, "encoder"),
        "ranker": parts_version(parts, "ranker"),
    }
    assert not any("last row" in line for line in notes["text"])
    assert notes["judge"]["num_pairs"] == 30
    bundle = load_bundle(parts["bundle"])
    assert notes["bundle"] == bundle.revision
    assert bundle.quality == report.quality_rows(stated)
    card = (parts["bundle"] / "MODEL_CARD.md").read_text()
    assert f"| served | {means['served']['ndcg@10']:.3f} |" in card.replace("| 1.0 |", "| 1.000 |")
    assert card.count("\n## Quality\n") == card.count("\n## Calibration\n") == card.count("\n## Order\n") == 1
    assert (tmp_path / "report.md").read_text().startswith("# jobs: test queries")
    assert _png_size(tmp_path / "report.png")[0] > 500
    assert "report.png" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert all(f"<td>{system}</td>" in page for system in [*systems, "judge"])
    assert "Queries that served ranks best and worst" in page
    assert 'src="http' not in page
    console = rich.console.Console(file=io.StringIO(), width=100)
    console.print(report.compact(stated))
    rows = {line.split()[0]: line.split() for line in console.file.getvalue().splitlines() if line.strip()}
    assert set(systems) <= set(rows)
    assert rows["ranker"][1] == f"{means['ranker']['ndcg@10']:.3f}".removeprefix("0")


def test_launcher_without_a_bundle_has_the_rows_that_need_none(parts, tmp_path):
    systems = ("bm25:short", "minilm")
    config = config_of(parts, bundle="nowhere", systems=systems, num_queries=4, other_rankers=())
    evaluate.main(config, tmp_path)
    stated = json.loads((tmp_path / "report.json").read_text())
    assert [group["num_queries"] for group in stated["groups"]] == [4]
    assert list(stated["groups"][0]["columns"]["all"]["means"]) == list(systems)


def test_a_bundle_that_could_not_be_fitted_is_measured_by_what_it_has(parts, tmp_path):
    bundle = shutil.copytree(parts["bundle"], tmp_path / "bundle")
    (bundle / "orders.json").write_text(json.dumps(Orders.unfitted(rank_depth=3).to_json()))
    relist(bundle)
    config = config_of(
        parts, bundle=str(bundle), other_rankers=(), systems=("bm25:short", "rrf", "sum", "served")
    )
    evaluate.main(dataclasses.replace(config, num_queries=4), tmp_path)
    stated = json.loads((tmp_path / "report.json").read_text())
    assert list(stated["groups"][0]["columns"]["all"]["means"]) == ["bm25:short", "rrf", "served"]
    assert any("the bundle has no order sum" in note for note in stated["notes"]["text"])


@pytest.mark.parametrize(
    "changes", [{"num_queries": 4}, {"split": "validation"}, {"systems": ("sum", "served")}]
)
def test_only_a_full_table_of_test_queries_replaces_the_one_of_the_card(parts, tmp_path, capsys, changes):
    bundle = shutil.copytree(parts["bundle"], tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in bundle.iterdir() if path.is_file()}
    systems = ("encoder", "rrf", "sum", "ranker", "sum+ranker", "served")
    config = config_of(parts, bundle=str(bundle), other_rankers=(), systems=systems)
    evaluate.main(dataclasses.replace(config, **changes), tmp_path)
    assert before == {path.name: path.read_bytes() for path in bundle.iterdir() if path.is_file()}
    assert "not put into the bundle's card" in " ".join(capsys.readouterr().out.split())
    evaluate.main(config, tmp_path)
    assert [row["system"] for row in load_bundle(bundle).quality] == list(systems)


def test_a_bundle_of_other_data_or_another_vertical_is_refused(parts, tmp_path):
    other = shutil.copytree(parts["collection"], tmp_path / "collection")
    with (other / "documents.jsonl").open("a") as file:
        file.write('{"id": "new", "title": "new", "tasks": []}\n')
    with pytest.raises(InputError, match="was made from other data"):
        evaluate.main(config_of(parts, collection=str(other)), tmp_path)
    vertical = shutil.copytree(parts["vertical"], tmp_path / "vertical")
    (vertical / "policy.md").write_text("Grade 0.")
    with pytest.raises(InputError, match="was made with another vertical"):
        evaluate.main(config_of(parts, vertical=str(vertical)), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": ("bm25:long",)}, "no view 'long': set systems=bm25:<view> to short or full"),
        ({"systems": ("bm26",)}, "unknown system 'bm26': set systems to some of bm25:short"),
        ({"bundle": ""}, "system 'encoder' needs bundle: set bundle="),
        ({"bundle": "", "systems": ("bm25",)}, "other_rankers sort what a bundle finds"),
        ({"systems": ("server",)}, "system 'server' needs server"),
        ({"server": "http://127.0.0.1:9"}, "does not answer .*: start python -m serve.main"),
        (
            {"baseline": "judge"},
            "baseline 'judge' must be .*: set baseline to bm25:short or bm25:full or minilm",
        ),
        ({"systems": ("judge",)}, "add one to systems, for example bm25"),
        (
            {"systems": ("judge", "encoder"), "baseline": "sum"},
            "baseline 'sum' must be .*: set baseline to encoder",
        ),
        ({"other_rankers": ("twin",)}, "write name=folder"),
        ({"other_rankers": ("minilm=x",)}, "is a system already"),
        ({"split": "other"}, "no queries in split"),
        ({"collection": "no/such/place"}, "no/such/place"),
    ],
)
def test_wrong_configs_are_one_message(parts, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        evaluate.main(config_of(parts, **changes), tmp_path)


@pytest.mark.parametrize(
    ("kind", "loader"), [("exact", ExactIndex), ("scann", ScannIndex), ("bm25", Bm25Index)]
)
def test_index_launcher_writes_an_index_that_knows_its_origin(parts, tmp_path, kind, loader):
    names = {key: str(parts[key]) for key in ("encoder", "collection", "vertical")}
    index.main(index.IndexConfig(kind=kind, **names), tmp_path)
    loaded = loader.load(tmp_path / "index")
    assert len(loaded.ids) == 40
    assert (loaded.metadata["view"], loaded.metadata["collection"]) == ("short", "collection")
    assert (len(loaded.metadata.get("encoder", "")) == 12) == (kind != "bm25")
