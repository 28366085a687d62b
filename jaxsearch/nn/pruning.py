"""Smaller decoders cut from larger ones: whole layers, MLP neurons, query heads, key/value groups.

Only structure goes, so the result is an ordinary decoder with smaller numbers in its config. Layers go by the damage
that their absence does (`drop_layers`); neurons and heads by what `osscar` finds in the second moments of their outputs
(`collect_moments`, then `prune_widths`). Healing is training: `train.ranker` with the unpruned ranker as teacher.

Source: system.md §4 gives the recipe; the methods are Meng et al., arXiv 2403.12983 (widths) and exhaustive greedy
removal (layers).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float64, Int

from jaxsearch.errors import InputError
from jaxsearch.nn.layers import Linear, matmul_precision
from jaxsearch.nn.osscar import Kept, channels_of, keep_rows, prune
from jaxsearch.nn.transformer import Decoder, DecoderConfig, LayerStates

Method = Literal["osscar", "magnitude", "random"]
TOKENS_PER_CHANNEL = 4
"""Fewer tokens than this for each channel leave the second moments too uncertain to refit a map on."""


def keep_layers(model: Decoder, keep: Sequence[int]) -> Decoder:
    """A new decoder with the layers `keep` (indices, rising) of `model`; shares no buffer with it.

    Keeping all layers gives an identical model; adapters are kept with their layers.

    Raises: InputError when `keep` is empty, not rising, or has an index that is no layer.
    """
    keep, num_layers = list(keep), model.config.num_layers
    if not keep or keep != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= num_layers:
        raise InputError(f"layers to keep must be rising indices from 0 to {num_layers - 1}, not {keep}")
    pruned = _copy(model)
    rows = jnp.asarray(keep)
    nnx.update(pruned.layers, jax.tree.map(lambda stacked: stacked[rows], nnx.state(pruned.layers)))
    pruned.config = dataclasses.replace(model.config, num_layers=len(keep))
    return pruned


class Dropped(NamedTuple):
    """A layer (its index in the whole model) that went, and the damage of the model without it and those before."""

    layer: int
    damage: float


def drop_layers(
    model: Decoder, count: int, damage: Callable[[Decoder], float]
) -> tuple[list[int], list[Dropped]]:
    """The layers that stay when `count` go one by one, each time the one whose absence does the least damage.

    Args: `damage` measures a smaller decoder, lower is better, NaN worst; it is called about layers * count times.
    Returns: indices for `keep_layers`; what went, in that order.
    Raises: InputError when no layer would stay.
    """
    kept, dropped = list(range(model.config.num_layers)), []
    if not 0 <= count < len(kept):
        raise InputError(f"{count} of {len(kept)} layers cannot go: at least one must stay")
    for _ in range(count):
        damages = [damage(keep_layers(model, [other for other in kept if other != layer])) for layer in kept]
        best = int(np.argmin(np.nan_to_num(damages, nan=np.inf)))
        dropped.append(Dropped(kept.pop(best), float(damages[best])))
    return kept, dropped


@dataclasses.dataclass(frozen=True)
class Moments:
    """Per layer XᵀX of what goes into `down_proj` (`mlp`) and into `o_proj` (`heads`), over `num_tokens` tokens."""

    mlp: Float64[np.ndarray, "l f f"]
    heads: Float64[np.ndarray, "l channels channels"]
    num_tokens: int


class PackedTokens(NamedTuple):
    """Rows of texts one after another, told apart by `segment_ids` (0: padding), and which tokens count."""

    tokens: Int[Any, "b t"]
    segment_ids: Int[Any, "b t"]
    where: Bool[Any, "b t"]


def collect_moments(model: Decoder, batches: Iterable[PackedTokens]) -> Moments:
    """Second moments of every layer's inner states in one pass of the uncut model over `batches`.

    Products of a batch are float32 on the devices, wherever model and batch lie (a sharded batch is summed over its
    devices); batches are added up in float64 on the host.

    Raises: InputError when nothing counts.
    Accuracy: the sums are within 3e-7 of sums in float64 of the same states, see `tests/test_pruning.py`.
    """
    graph, weights = nnx.split(model)
    run = jax.jit(functools.partial(_moments, graph))
    sums: list[Float64[np.ndarray, "l f f"]] = []
    num_tokens = 0
    for batch in batches:
        found = jax.device_get(run(weights, *batch))
        sums = sums or [np.zeros(moment.shape, np.float64) for moment in found]
        for total, moment in zip(sums, found, strict=True):
            total += moment
        num_tokens += int(np.sum(batch.where))
    if not num_tokens:
        raise InputError("there are no tokens to calibrate pruning on")
    mlp, heads = sums
    return Moments(mlp, heads, num_tokens)


@dataclasses.dataclass(frozen=True)
class Widths:
    """What a pruned decoder keeps of each layer; None keeps all.

    `num_kv_heads` drops key/value heads with all their query heads, `num_heads` drops as many query heads of each
    key/value head: one of both.
    """

    mlp_dim: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None

    def applied(self, config: DecoderConfig) -> DecoderConfig:
        """The config of the pruned decoder.

        Raises: InputError for widths that the decoder does not have.
        """
        if self.num_heads is not None and self.num_kv_heads is not None:
            raise InputError("prune num_heads or num_kv_heads, not both")
        per_group = config.num_heads // config.num_kv_heads
        num_kv_heads = config.num_kv_heads if self.num_kv_heads is None else self.num_kv_heads
        num_heads = num_kv_heads * per_group if self.num_heads is None else self.num_heads
        limits = {
            "mlp_dim": (config.mlp_dim if self.mlp_dim is None else self.mlp_dim, config.mlp_dim),
            "num_kv_heads": (num_kv_heads, config.num_kv_heads),
            "num_heads": (num_heads, config.num_heads),
        }
        for name, (wanted, there) in limits.items():
            if not 1 <= wanted <= there:
                raise InputError(f"{name} {wanted} is not from 1 to the decoder's {there}")
        return dataclasses.replace(
            config, mlp_dim=limits["mlp_dim"][0], num_heads=num_heads, num_kv_heads=num_kv_heads
        )


@dataclasses.dataclass(frozen=True)
class Search:
    """How neurons and heads are chosen.

    `osscar` refits the rows that stay; `magnitude` (the norm of a group's rows) and `random` leave them as they are.
    """

    method: Method = "osscar"
    chunk: int = 16
    """Neurons removed at a time before what is left is refitted; heads always go one by one."""
    num_swaps: int = 8
    """Exchanges of a kept for a removed neuron or head in each layer, at most."""
    seed: int = 0
    """Of the method random."""

    def __post_init__(self):
        if self.chunk < 1 or self.num_swaps < 0:
            raise InputError(
                f"search: chunk {self.chunk} must be at least 1, num_swaps {self.num_swaps} at least 0"
            )


class WidthErrors(NamedTuple):
    """Per layer the share of the energy of `down_proj`'s and of `o_proj`'s output that is lost.

    On the states of the uncut model: what a layer loses because those before it are cut too is not in it.
    """

    mlp: list[float]
    heads: list[float]


def tokens_needed(widths: Widths, config: DecoderConfig) -> int:
    """Calibration tokens without which `prune_widths` refuses."""
    smaller = widths.applied(config)
    neurons = config.mlp_dim if smaller.mlp_dim < config.mlp_dim else 0
    channels = config.num_heads * config.head_dim if smaller.num_heads < config.num_heads else 0
    return TOKENS_PER_CHANNEL * max(neurons, channels)


def prune_widths(
    model: Decoder, moments: Moments, widths: Widths, search: Search | None = None
) -> tuple[Decoder, WidthErrors]:
    """A new decoder with fewer neurons and heads in every layer; shares no buffer with `model`.

    Keeping all gives an identical model. Raises: InputError for widths that do not fit, adapters that are not merged,
    or fewer than `TOKENS_PER_CHANNEL` calibration tokens a channel.
    """
    search = search or Search()
    config, whole = widths.applied(model.config), model.config
    pruned = _copy(model)
    attention, mlp = pruned.layers.self_attn, pruned.layers.mlp
    kernels = {}
    for name, linear in (("down_proj", mlp.down_proj), ("o_proj", attention.o_proj)):
        if not isinstance(linear, Linear):
            raise InputError("merge the model's adapters before pruning it")
        kernels[name] = np.asarray(linear.kernel[...], np.float64)
    if moments.num_tokens < (needed := tokens_needed(widths, whole)):
        raise InputError(
            f"these cuts need at least {needed} calibration tokens, there are {moments.num_tokens}; calibrate on more "
            "texts"
        )
    per_group = whole.num_heads // whole.num_kv_heads
    of_mlp = [
        _choose(search, gram, kernel, config.mlp_dim, layer=layer)
        for layer, (gram, kernel) in enumerate(zip(moments.mlp, kernels["down_proj"], strict=True))
    ]
    drops_groups = config.num_kv_heads < whole.num_kv_heads
    head_size = whole.head_dim * (per_group if drops_groups else 1)
    of_heads = [
        _choose(
            dataclasses.replace(search, chunk=1),
            gram,
            kernel,
            config.num_kv_heads if drops_groups else config.num_heads,
            group_size=head_size,
            num_classes=1 if drops_groups else whole.num_kv_heads,
            layer=layer,
        )
        for layer, (gram, kernel) in enumerate(zip(moments.heads, kernels["o_proj"], strict=True))
    ]
    neurons = np.array([kept.groups for kept in of_mlp])
    _keep_rows(mlp.down_proj, of_mlp)
    _keep_columns(mlp.gate_proj, neurons)
    _keep_columns(mlp.up_proj, neurons)
    _keep_rows(attention.o_proj, of_heads)
    _keep_columns(attention.q_proj, np.array([channels_of(kept.groups, head_size) for kept in of_heads]))
    if drops_groups:
        rows = np.array([channels_of(kept.groups, whole.head_dim) for kept in of_heads])
        _keep_columns(attention.k_proj, rows)
        _keep_columns(attention.v_proj, rows)
    pruned.config, attention.num_kv_heads = config, config.num_kv_heads
    return pruned, WidthErrors(
        [kept.relative_error for kept in of_mlp], [kept.relative_error for kept in of_heads]
    )


def _copy(model: Decoder) -> Decoder:
    structure, state = nnx.split(model)
    return nnx.merge(structure, jax.tree.map(jnp.copy, state))


def _moments(
    graph: Any, weights: Any, tokens: Array, segment_ids: Array, where: Array
) -> tuple[Array, Array]:
    decoder: Decoder = nnx.merge(graph, weights)
    counts = where.reshape(-1, 1)

    def second_moment(rows: Array) -> Array:
        rows = jnp.where(counts, rows.reshape(-1, rows.shape[-1]), 0.0).astype(jnp.float32)
        return jnp.einsum("ti,tj->ij", rows, rows, precision=matmul_precision(jnp.float32))

    def keep(states: LayerStates) -> tuple[Array, Array]:
        return second_moment(states.widened), second_moment(states.mixed)

    return decoder.observe(tokens, segment_ids > 0, keep, segment_ids=segment_ids)[1]


def _choose(
    search: Search,
    gram: np.ndarray,
    kernel: np.ndarray,
    num_keep: int,
    *,
    layer: int,
    group_size: int = 1,
    num_classes: int = 1,
) -> Kept:
    num_groups = len(gram) // group_size
    if search.method == "osscar" or num_keep == num_groups:
        return prune(
            gram,
            kernel,
            num_keep,
            group_size=group_size,
            num_classes=num_classes,
            chunk=search.chunk,
            num_swaps=search.num_swaps,
        )
    if search.method == "random":
        worth = np.random.default_rng((search.seed, layer, num_groups)).random(num_groups)
    else:
        worth = np.linalg.norm(kernel.reshape(num_groups, -1), axis=1)
    by_class = np.argsort(-worth.reshape(num_classes, -1), axis=1)[:, : num_keep // num_classes]
    starts = np.arange(num_classes)[:, None] * (num_groups // num_classes)
    return keep_rows(gram, kernel, (by_class + starts).reshape(-1).tolist(), group_size=group_size)


def _keep_rows(linear: Linear, kept: Sequence[Kept]) -> None:
    rows = np.stack([each.kernel for each in kept])
    linear.kernel.set_value(jnp.asarray(rows, linear.kernel.dtype))


def _keep_columns(linear: Linear, columns: Int[np.ndarray, "l kept"]) -> None:
    chosen = jnp.asarray(columns)
    linear.kernel.set_value(jnp.take_along_axis(linear.kernel[...], chosen[:, None, :], axis=2))
    if linear.bias is not None:
        linear.bias.set_value(jnp.take_along_axis(linear.bias[...], chosen, axis=1))
