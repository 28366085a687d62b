"""Timing, and what a device could do at most: repeats and their spread, the peak of a matrix product, FLOPs a token.

Model FLOPs utilisation (MFU) = tokens/s x `flops_per_token` / `matmul_peak`. Tokens are real ones, so padding lowers
it; attention products and recomputation are not counted. A peak that is measured beside other work is too low.
"""

import functools
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsearch.nn.layers import matmul_precision
from jaxsearch.sharding import flatten_state, is_kernel, param_axes

Key = TypeVar("Key", bound=Hashable)
PEAK_SIZES = (512, 1024, 2048, 4096, 8192)
PEAK_SECONDS = 0.008
"""The first of the sizes whose product takes this long stands for the peak, else the largest."""
PEAK_REPEATS = 3
TABLE_AXES = {"vocab", "positions"}
"""Axes of tables that tokens look up and are not multiplied with; a head is read at a few rows only."""


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each run after a warm-up, each waited for."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return seconds


def take_turns(
    calls: Mapping[Key, Callable[[], Any]], repeats: int, advance: Callable[..., None]
) -> dict[Key, list[float]]:
    """Seconds of each call in each repeat, the calls taking turns, each waited for; they must have run before."""
    seconds: dict[Key, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - started)
            advance()
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "minimum": min(values), "maximum": max(values)}


def matmul_rates(dtype: str, size: int, repeats: int) -> list[float]:
    """Operations/s of one device in products of two square matrices, summed in float32 as in networks, or int32."""
    is_float = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    draw = jax.random.normal if is_float else functools.partial(jax.random.randint, minval=-128, maxval=128)
    left = draw(jax.random.key(0), (size, size), dtype=jnp.dtype(dtype))
    options = {
        "precision": matmul_precision(left.dtype),
        "preferred_element_type": jnp.float32 if is_float else jnp.int32,
    }
    product = jax.jit(lambda x: jnp.dot(x, x, **options))
    return [2 * size**3 / seconds for seconds in timed(lambda: product(left), repeats)]


@functools.cache
def matmul_peak(dtype: str) -> float:
    """Operations/s of all devices together, by the best of a few products on one: what shares are stated of.

    Measured once a process. Simulated devices share one CPU, and count as one.
    """
    best = 0.0
    for size in PEAK_SIZES:
        best = max(matmul_rates(dtype, size, PEAK_REPEATS))
        if 2 * size**3 / best >= PEAK_SECONDS:
            break
    return best * (jax.process_count() if jax.default_backend() == "cpu" else jax.device_count())


def flops_per_token(model: nnx.Module, trainable: Any) -> int:
    """Of one training step: two a weight forwards, two for the gradient of what comes in, two more where it is trained.

    Example: three by five weights, all trained.
        >>> flops_per_token(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.Param)
        90
    """
    _, trained, rest = nnx.split(model, trainable, ...)
    return 6 * _multiplied(trained) + 4 * _multiplied(rest)


def weights_per_token(model: nnx.Module) -> int:
    """How many weights a token is multiplied with: two FLOPs each in a forward pass.

    Example:
        >>> weights_per_token(nnx.Linear(3, 5, rngs=nnx.Rngs(0)))
        15
    """
    return _multiplied(nnx.state(model))


def _multiplied(state: nnx.State) -> int:
    arrays, axes, has_two = flatten_state(state), param_axes(state), is_kernel(state)
    counted = [name for name in arrays if has_two[name] and not TABLE_AXES & set(axes[name] or ())]
    return sum(math.prod(arrays[name].shape) for name in counted)


def commit() -> str:
    """Of the source that runs, as Git abbreviates it; "-dirty" when files differ from it."""
    shown = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=False
    )
    return shown.stdout.strip() or "unknown"
