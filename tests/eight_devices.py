"""Trains a tiny decoder on the devices that this process sees and writes what came of it.

    python tests/eight_devices.py DATA FSDP TENSOR FOLDER

`test_sharding` starts it with eight simulated CPU devices: the number is fixed when JAX starts, and a process
with eight of them is slow at everything else. Writes `FOLDER/result.npz` (losses, parameters) and
`FOLDER/shardings.json` (specification and shape per device of every parameter and moment).
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxsearch.nn.lora import LoRAParam, add_lora
from jaxsearch.nn.transformer import Decoder, DecoderConfig
from jaxsearch.sharding import flatten_state
from train.step import MeshConfig, OptimizerConfig, TrainStep

NUM_STEPS = 4


def tiny_decoder() -> Decoder:
    config = DecoderConfig(
        family="qwen3",
        vocab_size=64,
        embed_dim=32,
        mlp_dim=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=10_000.0,
        rope_scaling=None,
        norm_eps=1e-6,
        max_positions=64,
        use_qk_norm=True,
        use_qkv_bias=True,
        use_output_bias=True,
        use_mlp_bias=True,
        tie_embeddings=False,
    )
    return Decoder(config, rngs=nnx.Rngs(0))


def batch_of(step: int) -> dict[str, np.ndarray]:
    """16 sequences of 8 tokens, of lengths 1 to 8."""
    rng = np.random.default_rng(step)
    lengths = rng.integers(1, 9, size=(16, 1))
    return {"tokens": rng.integers(0, 64, size=(16, 8)), "where": np.arange(8)[None] < lengths}


def next_token_loss(model: Decoder, batch: dict[str, jax.Array]):
    logits = model.logits(model(batch["tokens"], where=batch["where"]))[:, :-1]
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    losses = -jax.numpy.take_along_axis(log_probs, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    where = batch["where"][:, 1:].astype(losses.dtype)
    return (losses * where).sum(), where.sum(), {"tokens": batch["where"].sum()}


def take_steps(model: Decoder, mesh: MeshConfig, *, accumulate: int = 1, trainable=nnx.Param):
    """(the program, its last state, the losses) after `NUM_STEPS` steps."""
    program = TrainStep(
        model,
        next_token_loss,
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, accumulate=accumulate),
        mesh=mesh,
        num_steps=NUM_STEPS,
        seed=0,
        trainable=trainable,
    )
    state, losses = program.initial_state(), []
    for step in range(NUM_STEPS):
        state, metrics = program.take(state, batch_of(step))
        losses.append(float(metrics["loss"]))
    return program, state, losses


def main(data: str, fsdp: str, tensor: str, folder: str) -> None:
    mesh = MeshConfig(int(data), int(fsdp), int(tensor))
    _, state, losses = take_steps(tiny_decoder(), mesh)
    adapted, lora_losses = nnx.List([]), []
    if min(mesh.data, mesh.fsdp, mesh.tensor) > 1:
        adapted = tiny_decoder()
        add_lora(adapted, rank=4, alpha=8.0, targets="(q|o|up|down)_proj", rngs=nnx.Rngs(1))
        program, lora_state, lora_losses = take_steps(adapted, mesh, trainable=LoRAParam, accumulate=2)
        program.update(adapted, lora_state)
    moments = state["optimizer"][0]
    arrays = {
        **{f"params/{name}": leaf for name, leaf in state["params"].items()},
        **{f"mu/{name}": leaf for name, leaf in moments.mu.items()},
        **{f"nu/{name}": leaf for name, leaf in moments.nu.items()},
        **{f"lora/{name}": leaf for name, leaf in flatten_state(nnx.state(adapted)).items()},
    }
    layout = {
        name: {
            "spec": list(leaf.sharding.spec),
            "shape": leaf.shape,
            "shard_shape": leaf.addressable_shards[0].data.shape,
            "num_devices": len(leaf.sharding.device_set),
        }
        for name, leaf in arrays.items()
    }
    Path(folder, "shardings.json").write_text(json.dumps(layout))
    host = {name: np.asarray(leaf) for name, leaf in arrays.items()}
    np.savez(Path(folder, "result.npz"), losses=losses, lora_losses=lora_losses, **host)


if __name__ == "__main__":
    main(*sys.argv[1:])
