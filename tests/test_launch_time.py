"""The parts of a launch's time: every product is in them, and they sum to the whole."""

import jax
import pytest

from jaxsearch.buckets import Lattice
from jaxsearch.scoring.packing import ScoreRequest
from jaxsearch.scoring.prefill import PrefillScorer
from tests.small_models import QWEN3, make
from train.launch_time import launch_time, linear_maps
from train.speed import weights_per_token

LATTICE = Lattice.for_prompts(max_prefix_tokens=16, max_item_tokens=32, max_batch_tokens=256)
REQUEST = ScoreRequest((1, 2, 3), [[4, 5, 6]] * 9)


@pytest.fixture(scope="module")
def decoder():
    return make(QWEN3)


def test_the_parts_sum_to_the_whole(decoder):
    scorer = PrefillScorer(decoder, (0, 1), LATTICE)
    shares = launch_time(scorer, decoder, REQUEST, repeats=2)
    assert list(shares) == ["linear maps", "attention", "the rest"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["linear maps"] > 0
    assert shares["attention"] > 0


def test_no_linear_map_is_left_out(decoder):
    """XLA drops what nobody reads. It counts the loop over layers once."""
    rows = 256
    run = linear_maps(decoder, rows)
    shape = decoder.config
    in_layer = weights_per_token(decoder) / shape.num_layers
    last = 2 * shape.embed_dim * shape.num_kv_heads * shape.head_dim
    counted = jax.jit(run.func).lower(*run.args).compile().cost_analysis()["flops"]
    assert 2 * rows * (in_layer + last) <= counted < 1.1 * 2 * rows * (in_layer + last)
