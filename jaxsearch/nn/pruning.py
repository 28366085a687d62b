"""Smaller decoders cut from larger ones: which layers to keep is the caller's measurement."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsearch.errors import InputError
from jaxsearch.nn.transformer import Decoder


def keep_layers(model: Decoder, keep: Sequence[int]) -> Decoder:
    """A new decoder with the layers `keep` (indices, rising) of `model`; shares no buffer with it.

    Keeping all layers gives an identical model; adapters are kept with their layers.

    Raises: InputError when `keep` is empty, not rising, or has an index that is no layer.
    """
    keep, num_layers = list(keep), model.config.num_layers
    if not keep or keep != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= num_layers:
        raise InputError(f"layers to keep must be rising indices from 0 to {num_layers - 1}, not {keep}")
    structure, state = nnx.split(model)
    pruned = nnx.merge(structure, jax.tree.map(jnp.copy, state))
    rows = jnp.asarray(keep)
    nnx.update(pruned.layers, jax.tree.map(lambda stacked: stacked[rows], nnx.state(pruned.layers)))
    pruned.config = dataclasses.replace(model.config, num_layers=len(keep))
    return pruned
