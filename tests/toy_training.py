"""A small training run that a test can kill: noise in the loss, several batch shapes, one checkpoint in three steps.

    python tests/toy_training.py WORKDIR NUM_STEPS [SIGNAL_NAME AT_BATCH]

Sends itself the signal while it makes batch AT_BATCH; `SLOW SECONDS` says "training" and takes that long for every
batch instead, so that another process can choose the moment. At the end it writes `WORKDIR/params.npz`.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.loop import LoopConfig, fit
from train.step import OptimizerConfig

FEATURES = 4


class Net(nnx.Module):
    """Two layers, enough to have kernels, biases and an order."""

    def __init__(self, *, param_dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(FEATURES, 8, rngs=rngs, param_dtype=param_dtype, dtype=jnp.float32)
        self.out = nnx.Linear(8, 1, rngs=rngs, param_dtype=param_dtype, dtype=jnp.float32)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.out(jnp.tanh(self.hidden(inputs)))[:, 0]


def batch_of(number: int) -> dict[str, np.ndarray]:
    """8 or 16 rows; `where` leaves some out."""
    rng = np.random.default_rng(number)
    inputs = rng.normal(size=(8 * (1 + number % 2), FEATURES)).astype(np.float32)
    return {"inputs": inputs, "targets": inputs.sum(axis=1), "where": rng.random(len(inputs)) < 0.7}


def batches(start: int) -> Iterator[dict[str, np.ndarray]]:
    number = start
    while True:
        yield batch_of(number)
        number += 1


def squared_error(net: Net, batch: dict[str, jax.Array]):
    """Without noise."""
    where = batch["where"].astype(jnp.float32)
    errors = jnp.square(net(batch["inputs"]) - batch["targets"]) * where
    metrics = {"where_share": where.mean(), "tokens": where.sum()}
    return errors.sum(), where.sum(), metrics


def noisy_error(net: Net, batch: dict[str, jax.Array], key: jax.Array):
    """With noise on the inputs that only the key decides."""
    noise = 0.1 * jax.random.normal(key, batch["inputs"].shape)
    return squared_error(net, {**batch, "inputs": batch["inputs"] + noise})


def train(workdir: str | Path, num_steps: int, batches: Callable = batches) -> dict[str, np.ndarray]:
    """The parameters at the end."""
    net = Net()
    fit(
        net,
        noisy_error,
        batches,
        loop=LoopConfig(num_steps=num_steps, log_every=4, checkpoint_every=3),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3, weight_decay=0.1),
        workdir=workdir,
    )
    return params_of(net)


def params_of(net: nnx.Module) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(net))
    return {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in flat}


def main(workdir: str, num_steps: str, signal_name: str = "", at_batch: str = "-1") -> None:
    def interrupted(start: int) -> Iterator[dict[str, np.ndarray]]:
        for number, batch in enumerate(batches(start), start):
            if signal_name == "SLOW":
                print("training", flush=True)
                time.sleep(float(at_batch))
            elif number == int(at_batch):
                os.kill(os.getpid(), signal.Signals[signal_name])
            yield batch

    np.savez(Path(workdir) / "params.npz", **train(workdir, int(num_steps), interrupted))


if __name__ == "__main__":
    main(*sys.argv[1:])
