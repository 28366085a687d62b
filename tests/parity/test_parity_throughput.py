"""The steps that are timed beside torch's are the same steps: first losses agree, else the launcher refuses."""

import dataclasses
import json

import pytest

from configs import throughput as config
from jaxsearch.errors import InputError
from train import throughput


def test_first_losses_agree_and_every_way_is_timed(tmp_path):
    quick = dataclasses.replace(config.quick(), repeats=1, steps=("ranker", "encoder"), dtypes=("float32",))
    throughput.main(quick, tmp_path)
    figures = json.loads((tmp_path / "report.json").read_text())["figures"]
    for kind in ("ranker", "encoder"):
        ways = figures[kind]["float32"]
        assert set(ways) == {"packed", "padded", "torch"}
        losses = [way["first_loss"] for way in ways.values()]
        assert max(losses) / min(losses) - 1 < throughput.LOSS_TOLERANCE["float32"]
        assert all(way["speed"]["minimum"] > 0 for way in ways.values())
        assert ways["packed"]["slots_per_token"] < ways["padded"]["slots_per_token"]


def test_what_cannot_be_compared_is_refused(tmp_path):
    ranker = dataclasses.replace(config.quick().ranker, batch_queries=16)
    with pytest.raises(InputError, match="at most 8 queries"):
        throughput.main(dataclasses.replace(config.quick(), ranker=ranker), tmp_path)
