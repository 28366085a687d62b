"""Low-rank adapters on any `Linear`, added to and merged into a model in place.

Knows no model: modules are found by their path. Train with `trainable=LoRAParam`; export after `merge_lora`.
"""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsearch.errors import InputError
from jaxsearch.nn.layers import Linear, make_param, matmul_precision, project


class LoRAParam(nnx.Param):
    """A parameter of an adapter: the filter by which trainers find what to train."""


class LoRALinear(nnx.Module):
    """base(x) + (x @ lora_a) @ lora_b * scale.

    lora_a (in, rank) is random and lora_b (rank, out) zero: at first the output is the base's. A stacked kernel
    gets stacked adapters. Both are kept in the kernel's dtype. Source: Hu et al. 2021 (LoRA) §4.1.
    """

    def __init__(self, base: Linear, *, rank: int, alpha: float, rngs: nnx.Rngs):
        self.base = base
        *layers, in_dim, out_dim = base.kernel.shape
        in_axis, out_axis = base.kernel.get_metadata("axes")[-2:]
        stack: dict[str, Any] = {"num_layers": layers[0] if layers else None, "kind": LoRAParam}
        uniform = jax.nn.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", batch_axis=tuple(range(len(layers)))
        )
        zeros, dtype = jax.nn.initializers.zeros, base.kernel.dtype
        self.lora_a = make_param(uniform, rngs, (in_dim, rank), (in_axis, "lora_rank"), dtype, **stack)
        self.lora_b = make_param(zeros, rngs, (rank, out_dim), ("lora_rank", out_axis), dtype, **stack)
        self.scale = alpha / rank

    def __call__(self, inputs: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        dtype = self.base.dtype
        lora_a, lora_b = self.lora_a[...].astype(dtype), self.lora_b[...].astype(dtype)
        delta = project(project(inputs.astype(dtype), lora_a) * self.scale, lora_b)
        return self.base(inputs) + delta

    def columns(self, ids: Int[Array, "k"] | None = None) -> Float[Array, "i k"]:
        kernel = self.merged_kernel()
        return kernel if ids is None else kernel[:, ids]

    def merged_kernel(self) -> Float[Array, "*l i o"]:
        """kernel + lora_a @ lora_b * scale, summed in float32, in the kernel's dtype."""
        wide = jnp.float32
        lora_a, lora_b = self.lora_a[...].astype(wide), self.lora_b[...].astype(wide)
        delta = jnp.einsum("...ir,...ro->...io", lora_a, lora_b, precision=matmul_precision(wide))
        kernel = self.base.kernel[...]
        return (kernel.astype(wide) + delta * self.scale).astype(kernel.dtype)


def add_lora(model: nnx.Module, *, rank: int, alpha: float, targets: str, rngs: nnx.Rngs) -> list[str]:
    """Puts an adapter on every `Linear` of `model` in whose dotted path the regex `targets` is found.

    Args:
        rank: inner size of the adapters, at least 1.
        alpha: the adapter's output is scaled by alpha / rank.
        targets: searched for, so "q_proj|v_proj" matches "layers.self_attn.q_proj".
    Returns: the paths that were adapted.
    Raises: InputError when rank is below 1, `targets` is no regex or matches nothing, or adapters are present.
    """
    if rank < 1:
        raise InputError(f"LoRA rank is {rank}; use 1 or more")
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise InputError(f"LoRA targets {targets!r} is not a regular expression: {error}") from None
    if any(_children(model, LoRALinear)):
        raise InputError("the model has LoRA adapters already; call merge_lora first")
    found = list(_children(model, Linear))
    chosen = [entry for entry in found if pattern.search(entry[0])]
    if not chosen:
        paths = ", ".join(path for path, *_ in found)
        raise InputError(f"LoRA targets {targets!r} matches none of: {paths}")
    for _, parent, name, linear in chosen:
        setattr(parent, name, LoRALinear(linear, rank=rank, alpha=alpha, rngs=rngs))
    return [path for path, *_ in chosen]


def merge_lora(model: nnx.Module) -> list[str]:
    """Folds every adapter into its kernel and leaves the plain `Linear`; gives the paths that were merged."""
    adapted = list(_children(model, LoRALinear))
    for _, parent, name, adapter in adapted:
        adapter.base.kernel[...] = adapter.merged_kernel()
        setattr(parent, name, adapter.base)
    return [path for path, *_ in adapted]


def _children(model: nnx.Module, kind: type) -> Iterator[tuple[str, nnx.Module, str, Any]]:
    """(dotted path, parent, attribute, child) of every sub-module of that kind."""
    for path, module in nnx.iter_modules(model):
        for name, child in vars(module).items():
            if isinstance(child, kind):
                yield ".".join(map(str, (*path, name))), module, name, child
