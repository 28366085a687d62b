"""Pretrained weights ↔ modules: Hugging Face folders both ways, GGUF files in.

Because attributes are named as checkpoints name tensors, the table between the two follows from the model itself:
the stacked layer axis becomes an index in the name, and kernels (in, out) become rows (out, in). The table is total:
a tensor that has no place, or a place that has no tensor, is an error that names it. Formats: `tensors.py`
(safetensors), `gguf.py`, `hf_config.py`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxsearch.errors import InputError
from jaxsearch.files import read_object
from jaxsearch.nn.bert import Bert, BertConfig
from jaxsearch.nn.gguf import read_gguf
from jaxsearch.nn.hf_config import config_from_hf, config_to_hf
from jaxsearch.nn.tensors import Tensor, list_safetensors, write_safetensors
from jaxsearch.nn.transformer import Decoder

__all__ = ["Row", "config_from_hf", "config_to_hf", "conversion_table", "load_pretrained", "save_pretrained"]

CONFIG = "config.json"
SHARD_BYTES = 4 << 30
FLOATS = ("F64", "F32", "F16", "BF16")

_LEAVES = {"kernel": "weight", "weight": "weight", "bias": "bias"}
_IGNORED = {
    Decoder: re.compile(r".*\.rotary_emb\.inv_freq"),
    Bert: re.compile(r"(bert\.)?(embeddings\.position_ids|pooler\..*)|cls\..*"),
}
"""Tensors of checkpoints that our modules leave out on purpose: buffers, BERT's pooler and pre-training heads."""


@dataclass(frozen=True)
class Row:
    """One line of the conversion table.

    Attributes:
        name: The tensor in the checkpoint.
        path: The parameter in the module, attribute by attribute.
        layer: Index on the parameter's leading axis; None where it has no layer axis.
        is_transposed: The checkpoint has the axes (out, in), the parameter (in, out).
        shape: Of the tensor in the checkpoint.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    is_transposed: bool
    shape: tuple[int, ...]


def conversion_table(model: Decoder | Bert) -> list[Row]:
    """Where every tensor of a checkpoint of this model belongs, in the checkpoint's order.

    Args:
        model: A real or an abstract model (`nnx.eval_shape`).

    Raises:
        InputError: the model has parameters that no checkpoint holds, such as adapters.
    """
    rows, strange = [], []
    for path, param in _params(model).items():
        if path[-1] not in _LEAVES:
            strange.append(".".join(path))
            continue
        is_transposed = path[-1] == "kernel"
        stacked = next((i for i, part in enumerate(path) if part in ("layers", "layer")), None)
        shape = tuple(param.shape) if stacked is None else tuple(param.shape[1:])
        for layer in range(1) if stacked is None else range(param.shape[0]):
            parts = [*path[:-1], _LEAVES[path[-1]]]
            if stacked is not None:
                parts.insert(stacked + 1, str(layer))
            name = ".".join(parts)
            if isinstance(model, Decoder) and path[0] != "lm_head":
                name = f"model.{name}"
            rows.append(
                Row(
                    name,
                    path,
                    None if stacked is None else layer,
                    is_transposed,
                    shape[::-1] if is_transposed else shape,
                )
            )
    if strange:
        raise InputError(
            f"parameters without a place in a checkpoint: {', '.join(strange)}; call merge_lora before saving"
        )
    return sorted(
        rows, key=lambda row: (row.path[0] != rows[0].path[0], -1 if row.layer is None else row.layer)
    )


def load_pretrained(
    path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    use_remat: bool = False,
) -> Decoder | Bert:
    """Loads a model whose type the checkpoint states.

    Weights are read one tensor at a time straight into their place; apart from the model itself, at most one
    stacked parameter is held. Where `param_dtype` is the checkpoint's dtype, not a bit changes.

    Args:
        path: A folder with config.json and model.safetensors (or shards and their index), or a .gguf file.
        dtype: Of the computation.
        param_dtype: Of the weights; values of another dtype are rounded to nearest even.
        use_remat: Recompute layers in the backward pass.

    Raises:
        InputError: not such a folder or file; an unsupported model; and, in one message that lists them all,
            tensors that are unmapped, missing, duplicate, misshapen or not floating point.
    """
    path = Path(path)
    if path.is_dir():
        config, tensors = (
            read_object(path / CONFIG, hint="give a folder in the Hugging Face layout"),
            list_safetensors(path),
        )
    elif path.suffix == ".gguf" and path.is_file():
        config, tensors = read_gguf(path)
    else:
        raise InputError(
            f"{path} is neither a model folder (config.json, model.safetensors) nor a .gguf file"
        )
    try:
        ours = config_from_hf(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    options = {"dtype": dtype, "param_dtype": param_dtype, "use_remat": use_remat}

    def make() -> Decoder | Bert:
        kind: Any = Bert if isinstance(ours, BertConfig) else Decoder
        return kind(ours, rngs=nnx.Rngs(0), **options)

    model = nnx.eval_shape(make)
    return _fill(model, _match(model, tensors, path))


def save_pretrained(model: Decoder | Bert, directory: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config.json and weights as `transformers` names and lays them out; loading gives back every bit.

    Args:
        model: Without adapters (`merge_lora` first).
        directory: Made if absent; weights already there are replaced.
        shard_bytes: Beyond this size the weights are split into files with an index.

    Raises:
        InputError: see `conversion_table` and `config_to_hf`; raised before anything is written.
    """
    directory = Path(directory)
    table, params = conversion_table(model), _params(model)
    dtype = np.dtype(next(iter(params.values())).dtype)
    config = config_to_hf(model.config) | {"torch_dtype": dtype.name}
    host = {path: np.asarray(param[...]) for path, param in params.items()}

    def read(row: Row) -> np.ndarray:
        values = host[row.path] if row.layer is None else host[row.path][row.layer]
        return values.T if row.is_transposed else values

    directory.mkdir(parents=True, exist_ok=True)
    tensors = [(row.name, read(row).nbytes, lambda row=row: read(row)) for row in table]
    write_safetensors(directory, tensors, shard_bytes)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _params(model: nnx.Module) -> dict[tuple[str, ...], nnx.Param]:
    """{path: parameter} in the order of the attributes."""
    return {
        tuple(map(str, path)): param for path, param in nnx.iter_graph(model) if isinstance(param, nnx.Param)
    }


def _match(model: Decoder | Bert, tensors: Sequence[Tensor], origin: Path) -> dict[Row, Tensor]:
    """Pairs every row of the table with its tensor, or raises the one error that lists what does not pair."""
    rows = {row.name: row for row in conversion_table(model)}
    found: dict[str, list[Tensor]] = defaultdict(list)
    unmapped = []
    tied = "lm_head.weight" if isinstance(model, Decoder) and model.config.tie_embeddings else None
    for tensor in tensors:
        name = next((name for name in _spellings(model, tensor.name) if name in rows or name == tied), None)
        if name is not None:
            found[name].append(tensor)
        elif not _IGNORED[type(model)].fullmatch(tensor.name):
            unmapped.append(f"{tensor.name} {list(tensor.shape)}")
    head, embedding = found.pop(tied or "", None), found.get("model.embed_tokens.weight")
    problems = {
        "unmapped": unmapped,
        "missing": [f"{name} {list(row.shape)}" for name, row in rows.items() if name not in found],
        "duplicate": [
            f"{name} ({', '.join(f'{t.name} in {t.origin}' for t in same)})"
            for name, same in found.items()
            if len(same) > 1
        ],
        "misshapen": [
            f"{tensor.name} {list(tensor.shape)}, expected {list(rows[name].shape)}"
            for name, same in found.items()
            for tensor in same
            if tensor.shape != rows[name].shape
        ],
        "not floating point": [
            f"{tensor.name} {tensor.dtype}"
            for same in found.values()
            for tensor in same
            if tensor.dtype not in FLOATS
        ],
    }
    if head and embedding and not np.array_equal(head[0].read(), embedding[0].read()):
        problems["contradicting"] = ["lm_head.weight differs from the embeddings to which the config ties it"]
    if any(problems.values()):
        listed = "\n".join(f"  {what}: {entry}" for what, entries in problems.items() for entry in entries)
        raise InputError(
            f"{origin}: the tensors do not fit a {type(model).__name__} of this config; is it another model, "
            f"or an incomplete download?\n{listed}"
        )
    return {row: found[name][0] for name, row in rows.items()}


def _spellings(model: Decoder | Bert, name: str) -> Iterator[str]:
    """The name itself, then what it is called where the model is the body of, or has lost, an outer module."""
    yield name
    if isinstance(model, Decoder):
        yield f"model.{name}"
    else:
        yield name.removeprefix("bert.")


def _fill(model: Decoder | Bert, matched: dict[Row, Tensor]) -> Decoder | Bert:
    """The abstract model with real parameters."""
    by_path: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in matched:
        by_path[row.path].append(row)
    for path, param in _params(model).items():
        rows = by_path[path]
        if rows[0].layer is None:
            values = matched[rows[0]].read()
            values = np.ascontiguousarray(values.T if rows[0].is_transposed else values).astype(
                param.dtype, copy=False
            )
        else:
            values = np.empty(param.shape, param.dtype)
            for row in rows:
                tensor = matched[row].read()
                values[row.layer] = tensor.T if row.is_transposed else tensor
        param.set_value(jax.device_put(values))
    return model
