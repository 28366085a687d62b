"""One optimiser step as one jitted program on a mesh; `loop` takes many of them.

Forward, backward, accumulation over microbatches, clipping and AdamW run in a single program with donated state.
Gradients and moments are float32, and so is the arithmetic of the update; the parameters keep the dtype that the model
gives them (float32 masters for bf16 compute). A loss or gradient that is not finite freezes the state on the device in
that very step, and keeps it frozen, so that nothing bad is applied however late the host learns of it.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsearch.errors import InputError
from jaxsearch.sharding import (
    batch_sharding,
    batch_ways,
    flatten_state,
    is_kernel,
    make_mesh,
    on_one_device,
    param_shardings,
    put_batch,
    replicated,
    unflatten_state,
)
from train.config import Bound, Count, CountOrNone, Rate, Share

SUMMED = ("tokens", "slots")
"""Metrics of a loss that are sums, not means: real tokens, and places for tokens."""
LossFn = Callable[..., tuple[jax.Array, jax.Array, dict[str, jax.Array]]]
State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh."""

    data: int = -1
    """Copies of the model that share a batch; -1: all devices that the others leave."""
    fsdp: Count = 1
    """Devices over which parameters and optimiser state are cut; they share a batch too."""
    tensor: Count = 1
    """Devices over which each layer is cut."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and clipping."""

    learning_rate: Rate
    """At the peak, after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls to 0 at the last step."""
    warmup_steps: CountOrNone = 0
    weight_decay: Annotated[float, Bound(0)] = 0.0
    """Of kernels and tables; vectors (norms, biases) have none."""
    clip_norm: Annotated[float, Bound(0)] = 1.0
    """Largest global norm of a gradient; 0 does not clip."""
    b1: Share = 0.9
    b2: Share = 0.999
    accumulate: Count = 1
    """Microbatches into which a batch is cut to save memory."""


def learning_rate(
    config: OptimizerConfig, num_steps: int, step: Int[Array, ""] | Float[Array, ""]
) -> Float[Array, ""]:
    """The rate of step 0, 1, ... `num_steps` - 1: a linear warm-up to the peak, then the schedule down towards 0.

    Example:
        >>> config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=2)
        >>> [float(learning_rate(config, 6, jnp.float32(step))) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    step = step.astype(jnp.float32)
    warm = jnp.minimum((step + 1.0) / max(config.warmup_steps, 1), 1.0)
    done = jnp.clip((step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1), 0.0, 1.0)
    falling = {
        "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
        "linear": 1.0 - done,
        "constant": jnp.ones_like(done),
    }
    return config.learning_rate * warm * falling[config.schedule]


def batch_pieces(optimizer: OptimizerConfig, mesh: MeshConfig) -> int:
    """Into how many pieces a batch is cut: microbatches x devices that share it; its leading axes divide by that."""
    return optimizer.accumulate * batch_ways(make_mesh(**dataclasses.asdict(mesh)))


class TrainStep:
    """A model and its optimiser as arrays on a mesh, and the jitted step over them.

    `num_compilations` counts the programs traced so far: one per batch shape.

    Raises:
        InputError: nothing trainable, a mesh that does not fit the devices, or a layout that it does not allow.
    """

    def __init__(
        self,
        model: nnx.Module,
        loss_fn: LossFn,
        *,
        optimizer: OptimizerConfig,
        mesh: MeshConfig,
        num_steps: int,
        seed: int,
        trainable: Any,
    ):
        if optimizer.accumulate < 1 or num_steps < 1:
            raise InputError("accumulate and num_steps must be at least 1")
        if optimizer.schedule not in ("cosine", "linear", "constant"):
            raise InputError(f"unknown schedule {optimizer.schedule!r}: choose cosine, linear or constant")
        self._loss_fn, self._optimizer, self._num_steps, self._seed = loss_fn, optimizer, num_steps, seed
        self.num_compilations = 0
        self._has_key = "key" in inspect.signature(loss_fn).parameters
        self.mesh = make_mesh(**dataclasses.asdict(mesh))
        self._graph, params, rest = nnx.split(model, trainable, ...)
        self._params_like, self._rest_like = jax.eval_shape(lambda *states: states, params, rest)
        self._params = flatten_state(params)
        if not self._params:
            raise InputError(f"the model has no parameter that the filter {trainable} selects for training")
        self._transform = optax.chain(
            optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2),
            optax.add_decayed_weights(optimizer.weight_decay, mask=is_kernel(params)),
        )
        rest_shardings = param_shardings(rest, self.mesh)
        self._rest = jax.device_put(flatten_state(rest), rest_shardings)
        everywhere = replicated(self.mesh)
        self.shardings = self._state_shardings(param_shardings(params, self.mesh), everywhere)
        self._batch_sharding = batch_sharding(self.mesh, microbatched=True)
        self._step = jax.jit(
            self._take,
            static_argnums=3,
            donate_argnums=0,
            in_shardings=(self.shardings, rest_shardings, self._batch_sharding),
            out_shardings=(self.shardings, everywhere),
        )

    def initial_state(self) -> State:
        """Copies of the model's arrays: steps overwrite the state in place, and others may hold the originals."""

        def make(params: dict[str, jax.Array]) -> State:
            return {
                "params": jax.tree.map(jnp.copy, params),
                "optimizer": self._transform.init(_float32(params)),
                "step": jnp.zeros((), jnp.int32),
                "is_sound": jnp.ones((), bool),
            }

        params = jax.device_put(self._params, self.shardings["params"])
        return jax.jit(make, out_shardings=self.shardings)(params)

    def take(self, state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        """The next state and this step's metrics, without waiting for them; the old state's memory is reused.

        Metrics are those of the loss with "loss", "grad_norm" (before clipping) and "learning_rate".

        Raises:
            InputError: the batch cannot be cut into microbatches and over the devices.
        """
        leaves, structure = jax.tree.flatten(batch)
        cut: Sequence[Any] = self._cut(leaves)
        if jax.process_count() > 1:
            cut = [put_batch(leaf, self._batch_sharding) for leaf in cut]
        return self._step(state, self._rest, cut, structure)

    def model(self, state: State) -> Any:
        """The module with the state's parameters; it dies with the state."""
        return self._merge(state["params"], self._rest)

    def update(self, model: nnx.Module, state: State) -> None:
        """Puts the state's parameters into the module, in place; of several processes, each gets them whole."""
        params, rest = state["params"], self._rest
        if jax.process_count() > 1:
            params, rest = on_one_device(params), on_one_device(rest)
        nnx.update(
            model,
            unflatten_state(self._params_like, params),
            unflatten_state(self._rest_like, rest),
        )

    def _state_shardings(self, params: dict[str, Any], everywhere: Any) -> State:
        optimizer = optax.tree_map_params(
            self._transform,
            lambda _, sharding: sharding,
            jax.eval_shape(self._transform.init, self._params),
            params,
            transform_non_params=lambda _: everywhere,
        )
        return {"params": params, "optimizer": optimizer, "step": everywhere, "is_sound": everywhere}

    def _cut(self, leaves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """[b ...] → [microbatches b/microbatches ...]"""
        pieces, ways, cut = self._optimizer.accumulate, batch_ways(self.mesh), []
        for leaf in map(np.asarray, leaves):
            if leaf.ndim == 0 or leaf.shape[0] % (pieces * ways):
                raise InputError(
                    f"a batch array of shape {leaf.shape} cannot be cut into {pieces} microbatch(es) on {ways} "
                    "device(s): its leading axis must be divisible by accumulate * data * fsdp"
                )
            cut.append(leaf.reshape(pieces, leaf.shape[0] // pieces, *leaf.shape[1:]))
        return cut

    def _merge(self, params: Mapping[str, Any], rest: Mapping[str, Any]) -> Any:
        return nnx.merge(
            self._graph, unflatten_state(self._params_like, params), unflatten_state(self._rest_like, rest)
        )

    def _take(self, state: State, rest: dict[str, jax.Array], leaves: list[jax.Array], structure: Any):
        self.num_compilations += 1
        params, optimizer, step = state["params"], state["optimizer"], state["step"]
        loss, grads, metrics = self._gradient(params, rest, leaves, structure, step)
        norm = optax.tree.norm(grads)
        if self._optimizer.clip_norm > 0:
            scale = jnp.minimum(1.0, self._optimizer.clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda grad: grad * scale, grads)
        wide = _float32(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 power
            updates, moments = self._transform.update(grads, optimizer, wide)
        rate = learning_rate(self._optimizer, self._num_steps, step)
        is_sound = state["is_sound"] & jnp.isfinite(loss) & jnp.isfinite(norm)
        moved = jax.tree.map(
            lambda old, now, change: (now - rate * change).astype(old.dtype), params, wide, updates
        )
        kept = jax.tree.map(
            lambda new, old: jnp.where(is_sound, new, old), (moved, moments), (params, optimizer)
        )
        following = {"params": kept[0], "optimizer": kept[1], "step": step + 1, "is_sound": is_sound}
        return following, metrics | {"loss": loss, "grad_norm": norm, "learning_rate": rate}

    def _gradient(self, params: Any, rest: Any, leaves: list[jax.Array], structure: Any, step: jax.Array):
        """Loss, its gradient, and the metrics of the whole batch."""
        base_key = jax.random.fold_in(jax.random.key(self._seed), step)

        def of_total(params: Any, leaves: list[jax.Array], number: Any):
            extra = {"key": jax.random.fold_in(base_key, number)} if self._has_key else {}
            model = self._merge(params, rest)
            total, count, metrics = self._loss_fn(model, jax.tree.unflatten(structure, leaves), **extra)
            count = jnp.asarray(count).astype(jnp.float32)
            metrics = {name: jnp.asarray(value).astype(jnp.float32) for name, value in metrics.items()}
            summed = {name: value if name in SUMMED else value * count for name, value in metrics.items()}
            return total.astype(jnp.float32), (count, summed)

        def one(leaves: list[jax.Array], number: Any):
            (total, (count, summed)), grads = jax.value_and_grad(of_total, has_aux=True)(
                params, leaves, number
            )
            return total, count, _float32(grads), summed

        first = [leaf[0] for leaf in leaves]
        if self._optimizer.accumulate == 1:
            sums = one(first, 0)
        else:
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, first, 0)
            )
            numbers = jnp.arange(self._optimizer.accumulate)
            sums, _ = jax.lax.scan(
                lambda sums, piece: (jax.tree.map(jnp.add, sums, one(*piece)), None), zeros, (leaves, numbers)
            )
        total, count, grads, summed = sums
        share = 1.0 / jnp.where(count > 0, count, 1.0)
        metrics = {name: value if name in SUMMED else value * share for name, value in summed.items()}
        return total * share, jax.tree.map(lambda grad: grad * share, grads), metrics


def _float32(arrays: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), arrays)
