"""The ladder has torch's rungs where torch is installed, and they score as ours do."""

import dataclasses
import json

from configs import bench as bench_config
from jaxsearch.ranker import save_ranker
from tests.tiny_bundle import write_parts
from tests.tiny_collection import write_collection
from train import bench, ladder, ways


def test_torch_has_its_rungs_and_agrees(tmp_path):
    parts = write_parts(tmp_path)
    config = dataclasses.replace(bench_config.quick(), vertical=str(parts["vertical"]))
    save_ranker(tmp_path / "ranker", bench.make_ranker(config, "float32"), trained={})
    ladder.main(
        ladder.LadderConfig(
            ranker=str(tmp_path / "ranker"),
            retriever=str(parts["encoder"]),
            encoder="",
            collection=str(write_collection(tmp_path / "data")),
            vertical=str(parts["vertical"]),
            dtype="float32",
            num_queries=2,
            depth=4,
            timed_queries=1,
            window_seconds=0.2,
            has_memory=False,
        ),
        tmp_path,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == [
        "transformers, one by one",
        "transformers, batches",
        "sentence-transformers",
        "one by one",
        "batches",
        "shared prefix",
        "shared prefix, bfloat16",
    ]
    assert all(row["largest_difference"] <= ways.AGREEMENT["float32"] for row in report["rows"][:-1])
    assert all("measured" not in row or row["measured"]["num_errors"] == 0 for row in report["rows"])
    assert report["versions"].keys() == {"jax", *ways.LIBRARIES}
    assert not report["left_out"]
