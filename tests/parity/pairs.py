"""The same model twice: a tiny random one of `transformers`, and ours loaded from the folder it saves."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from jaxsearch.nn.bert import Bert
from jaxsearch.nn.convert import load_pretrained
from jaxsearch.nn.transformer import Decoder

TOLERANCE = 1e-4
"""Of max |error| / max |reference|, fp32. Measured maxima stand beside the assertions."""

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GQA = {"num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama gqa": GQA,
    "llama mqa": {"num_key_value_heads": 1},
    "llama wide heads": GQA | {"head_dim": 16},
    "llama attention bias": GQA | {"attention_bias": True},
    "llama mlp bias": GQA | {"mlp_bias": True},
    "llama tied": GQA | {"tie_word_embeddings": True},
    "llama theta and eps": {"rope_theta": 100_000.0, "rms_norm_eps": 1e-3},
    "llama linear": GQA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama dynamic": GQA | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama llama3": GQA | {"rope_scaling": LLAMA3},
    "llama yarn": GQA | {"rope_scaling": YARN},
    "llama yarn betas": GQA | {"rope_scaling": YARN | {"beta_fast": 8.0, "beta_slow": 2.0}},
    "llama yarn attention factor": GQA | {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "llama yarn mscale": GQA | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4}},
    "llama yarn not truncated": GQA | {"rope_scaling": YARN | {"truncate": False}},
    "llama everything": GQA
    | {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 16,
        "rope_scaling": LLAMA3,
    },
    "qwen2": {"num_key_value_heads": 4},
    "qwen2 gqa tied": GQA | {"tie_word_embeddings": True},
    "qwen2 yarn": GQA | {"rope_scaling": YARN},
    "qwen2 linear": GQA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "qwen3": GQA | {"head_dim": 16},
    "qwen3 mha": {"num_key_value_heads": 4, "head_dim": 8},
    "qwen3 attention bias": GQA | {"head_dim": 16, "attention_bias": True},
    "qwen3 tied yarn": GQA | {"head_dim": 16, "tie_word_embeddings": True, "rope_scaling": YARN},
    "qwen3 llama3": GQA | {"head_dim": 16, "rope_scaling": LLAMA3},
}

BERTS: dict[str, dict[str, Any]] = {
    "bert": {},
    "bert tanh": {"hidden_act": "gelu_new"},
    "bert relu eps": {"hidden_act": "relu", "layer_norm_eps": 1e-3},
    "bert three types": {"type_vocab_size": 3, "num_attention_heads": 8},
}


@dataclass
class Pair:
    """Reference, ours, and the folder the reference was saved to."""

    reference: Any
    ours: Any
    folder: Path


def make_pair(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> Pair:
    """Random weights everywhere, norms and biases too, wide enough that every part matters to the output."""
    family = case.split(maxsplit=1)[0]
    options = SIZES | (DECODERS | BERTS)[case]
    if family == "bert":
        loading = {"add_pooling_layer": False}
        reference = transformers.BertModel(transformers.BertConfig(**options), **loading)
    else:
        config = transformers.AutoConfig.for_model(family, **options)
        loading = {"attn_implementation": "eager"}
        reference = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in reference.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(1 + 0.3 * noise if "norm" in name.lower() and "weight" in name else 0.25 * noise)
    reference.to(dtype).save_pretrained(folder)
    # Loaded anew: a model cast to bf16 and back has bf16 rotary frequencies.
    reference = type(reference).from_pretrained(folder, dtype=torch.float32, **loading)
    return Pair(reference.eval(), load_pretrained(folder), folder)


def make_tokens(vocab_size: int, lengths: tuple[int, ...] = (40, 27, 1)) -> tuple[np.ndarray, np.ndarray]:
    """Random ids [b t] padded on the right, and where they count."""
    where = np.arange(max(lengths)) < np.array(lengths)[:, None]
    tokens = np.random.default_rng(1).integers(1, vocab_size, where.shape)
    return np.where(where, tokens, 0).astype(np.int32), where


def relative_error(ours: Any, reference: Any, where: np.ndarray | None = None) -> float:
    """max |ours - reference| / max |reference| over what counts."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    if where is not None:
        ours, reference = ours[where], reference[where]
    assert np.isfinite(ours).all()
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


@nnx.jit
def _outputs(model: Any, tokens: jax.Array, where: jax.Array) -> jax.Array:
    hidden = model(tokens, where=where)
    return model.logits(hidden) if isinstance(model, Decoder) else hidden


def our_outputs(model: Decoder | Bert, tokens: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Logits of a decoder, hidden states of a BERT."""
    return np.asarray(_outputs(model, jnp.asarray(tokens), jnp.asarray(where)))


def reference_outputs(model: Any, tokens: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The same of the reference."""
    with torch.no_grad():
        outputs = model(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(where).long())
    return (outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state).numpy()


def layer_of(stacked: nnx.Module, index: int) -> Any:
    """One layer of a module whose parameters are stacked."""
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(lambda values: values[index], state))


def record_calls(
    model: torch.nn.Module, tokens: np.ndarray, where: np.ndarray
) -> dict[str, tuple[np.ndarray, Any]]:
    """{module name: (its first input, its output)} of one run of the reference."""
    calls, hooks = {}, []

    def remember(name: str):
        def hook(_, args, kwargs, output):
            first = args[0] if args else kwargs.get("hidden_states")
            output = output[0] if isinstance(output, tuple) and not name.endswith("rotary_emb") else output
            calls[name] = (first, output)

        return hook

    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(remember(name), with_kwargs=True))
    reference_outputs(model, tokens, where)
    for hook in hooks:
        hook.remove()
    return calls


@contextlib.contextmanager
def perturbed(pair: Pair, row: Any, scale: float = 0.3) -> Iterator[Decoder | Bert]:
    """Adds the same noise to one tensor of the reference, until the end, and to its place in the copy of ours."""
    noise = scale * np.random.default_rng(2).standard_normal(row.shape).astype(np.float32)
    theirs, ours = dict(pair.reference.named_parameters())[row.name], nnx.clone(pair.ours)
    kept = theirs.detach().clone()
    param = dict(nnx.iter_graph(ours))[row.path]
    added = jnp.asarray(noise.T if row.is_transposed else noise)
    values = param[...]
    param.set_value(values + added if row.layer is None else values.at[row.layer].add(added))
    with torch.no_grad():
        theirs.add_(torch.tensor(noise))
        yield ours
        theirs.copy_(kept)
