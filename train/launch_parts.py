"""What a launch's time goes to: its linear maps and its attention, each as a program of its own.

They run with the launch's own shapes and lengths. Whole scorers side by side: `bench`, `ladder`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsearch.nn.layers import layer_at, narrow_weights
from jaxsearch.nn.packed import PackedQueries, packed_attention
from jaxsearch.nn.transformer import Decoder
from jaxsearch.scoring.packing import Launch, ScoreRequest, unpack
from jaxsearch.scoring.prefill import PrefillScorer
from train.speed import spread, take_turns


def launch_parts(
    scorer: PrefillScorer, decoder: Decoder, request: ScoreRequest, repeats: int
) -> dict[str, dict[str, float]]:
    """Shares of the time of the request's first launch, one at a time: `linear_maps` and `attention`, taking turns.

    That launch has the longest items. Neither share holds what the last layer computes for the items' ends alone.
    """
    assert not scorer.base, "attention to a base would be missing"
    config, launch = decoder.config, scorer.plan([request])[0]
    groups = config.num_heads // config.num_kv_heads
    shape = (launch.padded_tokens, config.num_kv_heads, groups + 2, config.head_dim)
    heads = jax.random.normal(jax.random.key(0), shape, decoder.embed_tokens.dtype)
    calls = {
        "whole": lambda: scorer.finish(launch, scorer.start(launch)),
        "linear_maps": linear_maps(decoder, launch.padded_tokens),
        "attention": attention_layers(launch, heads, config.num_layers - 1, use_kernel=scorer.use_kernel),
    }
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = take_turns(calls, repeats, lambda: None)
    whole = seconds.pop("whole")
    return {
        name: spread([part / all_ for part, all_ in zip(parts, whole, strict=True)])
        for name, parts in seconds.items()
    }


def linear_maps(decoder: Decoder, num_rows: int) -> functools.partial[Any]:
    """Every product of so many tokens with weights; of the last layer those that all of them need."""
    structure, stacked = nnx.split(narrow_weights(decoder.layers))
    last = decoder.config.num_layers - 1

    @jax.jit
    def run(stacked: Any, rows: Float[Array, "s d"]) -> tuple[Array, ...]:
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


def attention_layers(
    launch: Launch, heads: Float[Array, "s k each h"], count: int, *, use_kernel: bool = False
) -> functools.partial[Array]:
    """Attention of a launch's tokens, `count` times; the last two of `heads` are keys and values."""
    shapes = launch.shapes
    seen = unpack(jnp.asarray(launch.arrays()[0]), shapes.structure(launch.padded_tokens)).seen

    @jax.jit
    def run(seen: PackedQueries, queries: Array, keys: Array, values: Array) -> Array:
        def step(_: Any, queries: Array) -> Array:
            return packed_attention(queries, keys, values, seen, shapes.windows, None, use_kernel)

        return jax.lax.fori_loop(0, count, step, queries)

    return functools.partial(run, seen, heads[:, :, :-2], heads[:, :, -2], heads[:, :, -1])
