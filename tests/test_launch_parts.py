"""The parts of a launch's time compute what the whole does of them."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsearch.buckets import Lattice
from jaxsearch.nn.packed import packed_attention
from jaxsearch.scoring.packing import ScoreRequest, unpack
from jaxsearch.scoring.prefill import PrefillScorer
from tests.small_models import QWEN3, make
from train import speed
from train.launch_parts import attention_layers, launch_parts, linear_maps
from train.speed import matmul_rates, weights_per_token

LATTICE = Lattice.for_prompts(max_prefix_tokens=16, max_item_tokens=32, max_batch_tokens=256)
REQUEST = ScoreRequest((1, 2, 3), [[4, 5, 6]] * 9)


@pytest.fixture(scope="module")
def decoder():
    return make(QWEN3)


@pytest.fixture(scope="module")
def scorer(decoder):
    return PrefillScorer(decoder, (0, 1), LATTICE)


def test_each_part_is_a_share_of_the_whole_of_its_repeat(scorer, decoder, monkeypatch):
    repeats = [(10.0, 4.0, 2.0), (8.0, 6.0, 1.0), (4.0, 2.0, 3.0)]  # seconds of whole, linear maps, attention
    passed = (seconds for repeat in repeats for taken in repeat for seconds in (1.0, taken))
    clock = itertools.accumulate(passed)
    monkeypatch.setattr(speed, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert launch_parts(scorer, decoder, REQUEST, repeats=3) == {
        "linear_maps": {"median": 0.5, "minimum": 0.4, "maximum": 0.75},
        "attention": {"median": 0.2, "minimum": 0.125, "maximum": 0.75},
    }
    assert next(clock, None) is None


def test_no_linear_map_is_left_out(decoder):
    """XLA drops what nobody reads. It counts the loop over layers once."""
    rows = 256
    run = linear_maps(decoder, rows)
    shape = decoder.config
    in_layer = weights_per_token(decoder) / shape.num_layers
    last = 2 * shape.embed_dim * shape.num_kv_heads * shape.head_dim
    counted = jax.jit(run.func).lower(*run.args).compile().cost_analysis()["flops"]
    assert 2 * rows * (in_layer + last) <= counted < 1.1 * 2 * rows * (in_layer + last)


def test_attention_is_the_launchs_own(scorer):
    launch = scorer.plan([REQUEST])[0]
    size = launch.padded_tokens
    heads = jax.random.normal(jax.random.key(0), (size, 2, 4, 8))
    prompts = unpack(jnp.asarray(launch.arrays()[0]), scorer.shapes.structure(size))
    queries, others = heads[:, :, :2], (heads[:, :, 2], heads[:, :, 3])
    for _ in range(2):
        queries = packed_attention(queries, *others, prompts.seen, scorer.shapes.windows)
    np.testing.assert_allclose(attention_layers(launch, heads, 2)(), queries, atol=1e-6)


def test_products_of_integers_are_timed_too():
    assert matmul_rates("int8", 64, 2)[0] > 0
