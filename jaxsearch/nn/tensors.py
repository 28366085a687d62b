"""Named tensors in safetensors files: listed from the headers first, read one at a time, written in shards.

A listing keeps duplicates, because whether a checkpoint is whole is for `convert.py` to judge. Nothing here knows
a model. Next: `convert.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy learns bfloat16, which safetensors then returns)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxsearch.errors import InputError
from jaxsearch.files import read_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """A tensor that has not been read yet.

    Attributes:
        name: Its name in the checkpoint.
        origin: The file it lies in.
        shape: Sizes, outermost first.
        dtype: As safetensors writes it: F32, BF16, I64, ...
        read: Gives the values; every call reads anew and the result may be kept.
    """

    name: str
    origin: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def list_safetensors(directory: Path) -> list[Tensor]:
    """Lists the tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises:
        InputError: neither file is there, a shard is missing or damaged, or index and shards disagree; all
            disagreements in one message.
    """
    if (directory / WEIGHTS).exists():
        return _list_file(directory / WEIGHTS)
    if (directory / INDEX).exists():
        weight_map = read_object(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(
                f"{directory / INDEX}: `weight_map` is missing or empty; download the checkpoint again"
            )
        tensors = [t for file in sorted(set(weight_map.values())) for t in _list_file(directory / file)]
        where = {(tensor.name, Path(tensor.origin).name) for tensor in tensors}
        absent = sorted(f"{name} ({file})" for name, file in weight_map.items() if (name, file) not in where)
        unlisted = sorted(f"{name} ({file})" for name, file in where if name not in weight_map)
        problems = {"in the index but not in its shard": absent, "in a shard but not in the index": unlisted}
        if absent or unlisted:
            listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
            raise InputError(f"{directory / INDEX}: {listed}; download the checkpoint again")
        return tensors
    raise InputError(
        f"{directory} holds neither {WEIGHTS} nor {INDEX}; pickled weights (.bin, .pt) are not read: "
        "save the model as safetensors"
    )


def _list_file(path: Path) -> list[Tensor]:
    try:
        file = safe_open(path, framework="np")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is missing or damaged ({error}); download the checkpoint again") from error
    return [
        Tensor(name, str(path), tuple(s.get_shape()), s.get_dtype(), partial(_read, file, path, name))
        for name, s in slices.items()
    ]


def _read(file: safe_open, path: Path, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (OSError, SafetensorError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: {name} cannot be read ({error})") from error


def write_safetensors(
    directory: Path, tensors: Iterable[tuple[str, int, Callable[[], np.ndarray]]], shard_bytes: int
):
    """Writes tensors in the order given, as one file or as shards with an index; one shard in memory at a time.

    Weights that lie in the folder already are removed first: an old index would name old shards.

    Args:
        directory: An existing folder.
        tensors: (name, size in bytes, a function that gives the values).
        shard_bytes: A shard is closed before it would grow beyond this; a single larger tensor gets its own.
    """
    for old in (*directory.glob("model*.safetensors"), directory / INDEX):
        old.unlink(missing_ok=True)
    shards: list[list[tuple[str, int, Callable[[], np.ndarray]]]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if tensor[1] > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor[1]
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        values = {key: np.ascontiguousarray(read()) for key, _, read in shard}
        save_file(values, directory / name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(size for shard in shards for _, size, _ in shard)},
            "weight_map": {
                key: name for name, shard in zip(names, shards, strict=True) for key, _, _ in shard
            },
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
