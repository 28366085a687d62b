"""Reads a GGUF file as if it were a Hugging Face checkpoint: the same config, the same tensor names and layout.

Quantised blocks are decoded by the `gguf` package, one tensor at a time. GGUF is never written here, and the
tokenizer inside the file belongs to `jaxsearch.data.tokenizer`. Next: `convert.py`, which maps the names to params.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxsearch.errors import InputError
from jaxsearch.nn.tensors import Tensor

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    """Opens a GGUF file.

    Args:
        path: A file of architecture llama, qwen2 or qwen3, of any quantisation the `gguf` package can decode.

    Returns:
        The config as a Hugging Face config.json would state it, and the tensors under Hugging Face names, rows and
        columns as in safetensors; a tensor with no such name keeps its own, for the caller to report.

    Raises:
        InputError: not a GGUF file, another architecture, a RoPE scaling that the metadata leaves open, or a
            quantisation that cannot be decoded.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError(f'{path}: reading GGUF needs the gguf package: pip install -e ".[data]"') from error
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise InputError(f"{path}: not a readable GGUF file ({error}); is the download complete?") from error

    def field(key: str, default: Any = None) -> Any:
        found = reader.get_field(key)
        return default if found is None else found.contents()

    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    architecture = field("general.architecture")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{path}: architecture {architecture!r} is not supported; use one of {', '.join(ARCHITECTURES)}"
        )
    config = _config(
        path, architecture, lambda key, default=None: field(f"{architecture}.{key}", default), shapes
    )

    def read(tensor: Any, num_heads: int | None) -> np.ndarray:
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise InputError(f"{path}: {tensor.name}: {error}; use a file of another quantisation") from error
        values = np.asarray(values).reshape(shapes[tensor.name])
        return values if num_heads is None else _unpermute(values, num_heads)

    tensors = []
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        num_heads = None
        if architecture == "llama" and ".q_proj." in name:
            num_heads = config["num_attention_heads"]
        elif architecture == "llama" and ".k_proj." in name:
            num_heads = config["num_key_value_heads"]
        tensors.append(Tensor(name, str(path), shapes[tensor.name], "F32", partial(read, tensor, num_heads)))
    return config, tensors


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; unknown names come back unchanged.

    Example:
        >>> hf_name("blk.3.attn_q.weight")
        'model.layers.3.self_attn.q_proj.weight'
    """
    match name.split("."):
        case [top, kind] if top in _TOP:
            return f"{_TOP[top]}.{kind}"
        case ["blk", layer, part, kind] if part in _BLOCK and layer.isdecimal():
            return f"model.layers.{layer}.{_BLOCK[part]}.{kind}"
        case _:
            return name


def _unpermute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes the row order that llama.cpp gives q and k: interleaved rotary pairs back to two halves per head."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _config(path: Path, architecture: str, field: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    def required(key: str) -> Any:
        value = field(key)
        if value is None:
            raise InputError(
                f"{path}: the metadata lacks {architecture}.{key}; convert the model to GGUF again"
            )
        return value

    embed_dim, num_heads = int(required("embedding_length")), int(required("attention.head_count"))
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{path}: the tensor token_embd.weight is missing; convert the model to GGUF again")
    config: dict[str, Any] = {
        "model_type": architecture,
        "vocab_size": embedding[0],
        "hidden_size": embed_dim,
        "intermediate_size": int(required("feed_forward_length")),
        "num_hidden_layers": int(required("block_count")),
        "num_attention_heads": num_heads,
        "num_key_value_heads": int(field("attention.head_count_kv", num_heads)),
        "head_dim": int(field("attention.key_length", embed_dim // num_heads)),
        "rms_norm_eps": shortest_float(required("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": int(required("context_length")),
        "rope_theta": shortest_float(field("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
    }
    if "rope_freqs.weight" in shapes:
        raise InputError(
            f"{path}: the file states its RoPE scaling only as a table of factors (rope_freqs.weight), which cannot "
            "be written back to config.json; use the model's safetensors instead"
        )
    kind = field("rope.scaling.type", "none")
    if kind != "none":
        config["rope_scaling"] = {
            "rope_type": kind,
            "factor": shortest_float(field("rope.scaling.factor", 1.0)),
        }
        if kind == "yarn":
            original = field("rope.scaling.original_context_length", config["max_position_embeddings"])
            config["rope_scaling"]["original_max_position_embeddings"] = int(original)
    return config


def shortest_float(value: float) -> float:
    """The shortest decimal with the same float32: GGUF stores 1e-5 as 9.999999747378752e-06.

    Example:
        >>> shortest_float(9.999999747378752e-06)
        1e-05
    """
    return float(str(np.float32(value)))
