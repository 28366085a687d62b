"""The suite's quick variant, whole: every figure is there, finite and positive."""

import json
import math

from configs import gpu_suite as config
from train import gpu_suite


def numbers(value):
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from numbers(inner)
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_every_figure_is_measured(tmp_path):
    gpu_suite.main(config.quick(), tmp_path)
    figures = json.loads((tmp_path / "report.json").read_text())["figures"]
    assert figures.keys() >= {"parity", "training", "scoring", "retrieval", "attention"}
    found = list(numbers(figures))
    assert len(found) > 10
    assert all(math.isfinite(value) and value > 0 for value in found)
    assert figures["parity"]["shared_prefix_max_error"] < 1e-6  # measured 1.2e-7
    assert figures["attention"]["kernel_max_error"] < 0.02  # measured 0.0051
    assert (tmp_path / "report.md").read_text().startswith("#")
