"""What a launch's time goes to: its linear maps and its attention, each as a program of its own, and all the rest.

The parts run with the launch's own shapes and lengths, one launch at a time. XLA may join what stands beside a product
to it, so that a share is right to a few hundredths. Whole scorers side by side: `bench`, `ladder`.
"""

import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsearch.nn.layers import layer_at
from jaxsearch.nn.packed import PackedQueries, packed_attention
from jaxsearch.nn.transformer import Decoder
from jaxsearch.scoring.packing import Launch, ScoreRequest, unpack
from jaxsearch.scoring.prefill import PrefillScorer
from train.speed import timed


def launch_time(
    scorer: PrefillScorer, decoder: Decoder, request: ScoreRequest, repeats: int
) -> dict[str, float]:
    """Shares of the time of the request's first launch: `linear maps`, `attention`, `the rest`; they sum to 1."""
    launch = scorer.plan([request])[0]
    whole = timed(lambda: scorer.finish(launch, scorer.start(launch)), repeats)
    seconds = {
        "linear maps": timed(linear_maps(decoder, launch.padded_tokens), repeats),
        "attention": timed(_attention(decoder, scorer, launch), repeats),
    }
    shares = {name: statistics.median(each) / statistics.median(whole) for name, each in seconds.items()}
    return shares | {"the rest": 1 - sum(shares.values())}


def linear_maps(decoder: Decoder, num_rows: int) -> functools.partial[Any]:
    """Every product of so many tokens with weights; of the last layer those that all of them need."""
    structure, stacked = nnx.split(decoder.layers)
    last = decoder.config.num_layers - 1

    @jax.jit
    def run(stacked: Any, rows: Float[Array, "n d"]) -> tuple[Array, ...]:
        def layer(index: int | Array) -> Any:
            return nnx.merge(structure, jax.tree.map(lambda leaf: layer_at(leaf, index), stacked))

        def maps(index: int | Array, rows: Array) -> tuple[Array, ...]:
            attention, mlp = layer(index).self_attn, layer(index).mlp
            keys, values = attention.k_proj(rows), attention.v_proj(rows)
            rows = attention.o_proj(attention.q_proj(rows))
            return mlp.down_proj(mlp.up_proj(rows)), keys, values, mlp.gate_proj(rows)

        def step(index: Array, made: tuple[Array, ...]) -> tuple[Array, ...]:
            return maps(index, made[0])  # the others are kept, else XLA would leave their products out

        shapes = jax.eval_shape(maps, 0, rows)[1:]
        made = jax.lax.fori_loop(
            0, last, step, (rows, *(jnp.zeros(each.shape, each.dtype) for each in shapes))
        )
        return *made, *maps(last, made[0])[1:3]

    shape = (num_rows, decoder.config.embed_dim)
    return functools.partial(
        run, stacked, jax.random.normal(jax.random.key(0), shape, decoder.embed_tokens.dtype)
    )


def _attention(decoder: Decoder, scorer: PrefillScorer, launch: Launch) -> functools.partial[Any]:
    """The launch's attention of all layers but the last, where only its items' ends ask."""
    config, shapes = decoder.config, scorer.shapes
    ints = jnp.asarray(launch.arrays(base_tokens=len(scorer.base))[0])
    seen = unpack(ints, shapes.structure(launch.padded_tokens)).seen
    groups = config.num_heads // config.num_kv_heads
    heads = jax.random.normal(
        jax.random.key(0),
        (launch.padded_tokens, config.num_kv_heads, groups + 2, config.head_dim),
        decoder.embed_tokens.dtype,
    )

    @jax.jit
    def run(seen: PackedQueries, queries: Array, keys: Array, values: Array) -> Array:
        def step(_: Array, queries: Array) -> Array:
            return packed_attention(queries, keys, values, seen, shapes.windows, None, scorer.use_kernel)

        return jax.lax.fori_loop(0, config.num_layers - 1, step, queries)

    return functools.partial(run, seen, heads[:, :, :groups], heads[:, :, groups], heads[:, :, groups + 1])
