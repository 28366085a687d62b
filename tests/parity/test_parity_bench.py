"""What `train.bench` times is the same scoring in every way, else it refuses."""

import dataclasses
import json

import pytest

from configs import bench as config
from jaxsearch.errors import InputError
from train import bench, ways


def test_all_ways_score_alike_and_say_what_they_compute(tmp_path):
    bench.main(config.quick(), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {(row["dtype"], row["way"]): row for row in report["rows"]}
    llama = [key for key in rows if key[1].startswith("llama.cpp")]
    assert len(llama) == (6 if ways.has_llama() else 0)
    assert ways.has_llama() == (bench.LLAMA in report)
    assert len(rows) - len(llama) == 2 * 6
    for (dtype, name), row in rows.items():
        rounded = dtype == "float32" and "flash" in name
        assert row["largest_difference"] <= (ways.F16_AGREEMENT if rounded else ways.AGREEMENT[dtype])
        assert row["share_of_peak"]["median"] > 0
        assert (row["speed"]["minimum"] == 1.0) == ((dtype, name) == ("float32", bench.BASE))
    launches = {row["dtype"]: row for row in report["launches"]}
    assert list(launches) == ["float32", "bfloat16", "int8"]
    assert launches["bfloat16"].keys() - launches["int8"].keys() == {"linear_maps", "attention"}
    shared, batches = (rows["float32", f"jaxsearch, {way}"] for way in ("shared prefix", "batches"))
    assert shared["computed_tokens"] < batches["computed_tokens"]
    assert "not known" in (tmp_path / "report.md").read_text()


def test_other_scores_and_too_few_documents_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="need 5000 documents"):
        bench.main(dataclasses.replace(config.quick(), num_items=5000), tmp_path)
    monkeypatch.setitem(ways.AGREEMENT, "float32", 0.0)
    with pytest.raises(InputError, match="scores differ"):
        bench.main(dataclasses.replace(config.quick(), dtypes=("float32",)), tmp_path)
