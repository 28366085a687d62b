"""What a training run leaves on disk: its state while it runs, and the model folder when it is done.

`TrainCheckpoints` keeps whole training states (Orbax, written while the devices go on) and finds the newest one that is
whole. `save_model` and `load_model` handle the folder that leaves the training: an ordinary Hugging Face folder
(config, safetensors, tokenizer) with one more file, the card `jaxsearch.json`. Neither knows the five models:
what a card means is said in `encoder`, `judge` and `ranker`. Serving needs more than a model folder: see `bundle`.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.errors import InputError
from jaxsearch.files import read_object, replace_folder, write_json
from jaxsearch.nn.bert import Bert
from jaxsearch.nn.convert import load_pretrained, save_pretrained
from jaxsearch.nn.layers import narrow_weights
from jaxsearch.nn.transformer import Decoder

CARD = "jaxsearch.json"
VERSION_DIGITS = 12

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A training state read back: `arrays` as saved at `step`, and the metrics that were saved with it."""

    step: int
    arrays: Any
    metrics: dict[str, float]


class TrainCheckpoints:
    """Training states under one directory, one sub-directory per step.

    The newest `keep` stay, and the best one by `best_metric` (higher is better) among those saved with that metric.
    A save that fails (a full disk) is reported and the run goes on; a state that cannot be read back, or whose sums
    differ from those taken when it was saved, is set aside as `<step>.corrupt` and the one before it is used.

    Args:
        directory: made if absent.
        keep: number of newest states kept, at least 1.
        best_metric: key in the metrics given to `save`; None keeps the newest only.
        say: takes the messages for the person at the keyboard.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 2,
        best_metric: str | None = None,
        say: Callable[[str], None] = _log.warning,
    ):
        self.directory = Path(directory).absolute()
        self._best_metric, self._say = best_metric, say
        policies: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(max(keep, 1))]
        if best_metric is not None:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=self._worth, n=1, keep_checkpoints_without_metrics=False
                )
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> "TrainCheckpoints":
        return self

    def __exit__(self, *_) -> None:
        self.wait()
        self._manager.close()

    def save(self, step: int, arrays: Any, *, metrics: Mapping[str, float] | None = None) -> None:
        """Starts writing a pytree of arrays; returns once the devices may overwrite them.

        Saving a step again that is already there does nothing.
        """
        if step in self._manager.all_steps():
            return
        named = _named(arrays)
        sums = {name: int(value) for name, value in jax.device_get(_sums(named)).items()}
        layout = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named.items()}
        finite = {key: float(value) for key, value in (metrics or {}).items() if math.isfinite(value)}
        notes = {"step": step, "metrics": finite, "layout": layout, "sums": sums}
        self.wait()  # the manager raises a former save's failure here, instead of saving
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(named), notes=ocp.args.JsonSave(notes)),
                metrics=finite or None,
                force=True,
            )
        except Exception as error:
            self._report_failure(error)

    def wait(self) -> None:
        """Until everything that was started is on disk, or has failed and been reported."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._report_failure(error)

    def restore(self, like: Any, *, step: int | None = None) -> Restored | None:
        """The newest whole state, or that of `step`; None where there is none.

        Args:
            like: a pytree of arrays whose structure, shapes, dtypes and shardings the result takes.
        Raises:
            InputError: the state on disk is whole and belongs to another model or optimiser.
        """
        self.wait()
        named = _named(like)
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        for candidate in steps:
            restored = self._read(candidate, named)
            if restored is not None:
                leaves = [restored.arrays[name] for name in named]
                arrays = jax.tree.unflatten(jax.tree.structure(like), leaves)
                return dataclasses.replace(restored, arrays=arrays)
        return None

    def latest_step(self) -> int | None:
        """The newest step that is on disk; None where there is none."""
        self.wait()
        return max(self._manager.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the highest `best_metric`, the latest among equals; None where none has it."""
        self.wait()
        found = {step: self._metrics(step) for step in self._manager.all_steps()}
        known = {step: metrics for step, metrics in found.items() if self._best_metric in metrics}
        return max(known, key=lambda step: (self._worth(known[step]), step), default=None)

    def _worth(self, metrics: Mapping[str, float] | None) -> float:
        return (metrics or {}).get(self._best_metric or "", -math.inf)

    def _metrics(self, step: int) -> dict[str, float]:
        try:
            return self._notes(step)["metrics"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _notes(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]

    def _read(self, step: int, named: dict[str, jax.Array]) -> Restored | None:
        try:
            notes = self._notes(step)
            layout, sums = notes["layout"], notes["sums"]
            metrics = {key: float(value) for key, value in notes["metrics"].items()}
        except Exception as error:
            return self._set_aside(step, error)
        self._check_layout(step, layout, named)
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in named.items()
        }
        try:
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            arrays = self._manager.restore(step, args=arguments)["state"]
        except Exception as error:
            return self._set_aside(step, error)
        differing = [
            name for name, value in jax.device_get(_sums(arrays)).items() if int(value) != sums[name]
        ]
        if differing:
            return self._set_aside(step, ValueError(f"{differing[0]} is not what was saved"))
        return Restored(step, arrays, metrics)

    def _check_layout(self, step: int, saved: dict[str, Any], named: dict[str, jax.Array]) -> None:
        wanted = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named.items()}
        different = sorted(
            name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name)
        )
        if different:
            name = different[0]
            found, expected = saved.get(name, "absent"), wanted.get(name, "absent")
            raise InputError(
                f"{self.directory / str(step)} is a checkpoint of another model or optimiser: {len(different)} "
                f"arrays differ, e.g. {name}: {found} on disk, {expected} wanted. "
                "Give another --workdir, or delete that directory to start anew"
            )

    def _set_aside(self, step: int, error: Exception) -> None:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        path = self.directory / str(step)
        aside = path.with_name(f"{step}.corrupt")
        self._say(
            f"checkpoint {path} cannot be used ({reason[:200]}); now {aside.name}, trying the one before it"
        )
        if jax.process_index() == 0 and path.exists():
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()

    def _report_failure(self, error: Exception) -> None:
        if jax.process_count() == 1:  # others may still be writing theirs
            for half_written in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half_written, ignore_errors=True)
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        self._say(
            f"a checkpoint could not be written to {self.directory} ({reason[:200]}); the run goes on without it"
        )
        self._manager.reload()


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model folder in memory; `card` is empty where the folder has none (a model as its makers published it)."""

    model: Decoder | Bert
    tokenizer: Tokenizer
    card: dict[str, Any]


def save_model(
    directory: str | Path, model: Decoder | Bert, tokenizer: Tokenizer, card: Mapping[str, Any]
) -> None:
    """Writes a model folder, then puts it in place of the one that may be there: never a half-written one.

    Args:
        card: JSON values; written to `jaxsearch.json` with "version" added (see `model_version`).
    Raises:
        InputError: the place cannot be written to, or the disk is full.
    """
    directory = Path(directory).absolute()
    temporary: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
        temporary.chmod(0o755)
        save_pretrained(model, temporary)
        tokenizer.save(temporary)
        write_json(temporary / CARD, dict(card))
        write_json(temporary / CARD, {**card, "version": model_version(temporary)})
        replace_folder(temporary, directory)
    except OSError as error:
        raise InputError(f"cannot write the model folder {directory}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def load_model(
    path: str | Path, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32
) -> LoadedModel:
    """Reads a folder written by `save_model`, any Hugging Face folder of a known family, or a GGUF file.

    Args:
        dtype: of the computation. param_dtype: in which the weights are kept.
    Raises:
        InputError: no such path, a card that is not JSON, weights that are not what the card's version says, or
            what `load_pretrained` and `Tokenizer.from_path` refuse.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such model folder")
    card = read_card(path)
    if "version" in card and card["version"] != model_version(path):
        raise InputError(
            f"{path}: its files are not those that {CARD} was written for; export the model again"
        )
    model = load_pretrained(path, dtype=dtype, param_dtype=param_dtype)
    return LoadedModel(model, Tokenizer.from_path(path), card)


def load_decoder(
    directory: str | Path, *, kind: str, dtype: DTypeLike = jnp.float32
) -> tuple[Decoder, Tokenizer, dict[str, Any]]:
    """A decoder with a card, its tokenizer and the card; its weights are kept in `dtype`, those of norms in float32.

    Args:
        kind: what the card must say that the folder holds ("judge", "ranker").
    Raises:
        InputError: it holds another kind of model, or what `load_model` refuses.
    """
    loaded = load_model(directory, dtype=dtype)
    if loaded.card.get("kind") != kind or not isinstance(loaded.model, Decoder):
        found = f"a model of kind {loaded.card['kind']}" if loaded.card else "a model without a card"
        raise InputError(
            f"{directory} holds {found}, not of kind {kind}: train one with python -m train.{kind}"
        )
    return narrow_weights(loaded.model), loaded.tokenizer, loaded.card


def model_version(path: str | Path) -> str:
    """Twelve hex digits over weights, config, tokenizer and card: equal files, equal version.

    Raises:
        InputError: no such path.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such model folder")
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.json"))
    digest = hashlib.sha256()
    for file in files:
        if file.name == CARD:
            card = {key: value for key, value in read_card(path).items() if key != "version"}
            digest.update(json.dumps(card, sort_keys=True).encode())
            continue
        digest.update(_file_digest(str(file), file.stat().st_size, file.stat().st_mtime_ns))
    return digest.hexdigest()[:VERSION_DIGITS]


@functools.lru_cache(maxsize=64)
def _file_digest(path: str, size_bytes: int, modified_ns: int) -> bytes:
    """Cached by size and time of change, so that a large file is read once per process."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def read_card(path: Path) -> dict[str, Any]:
    """A model folder's card; empty where it has none."""
    return read_object(path / CARD) if (path / CARD).is_file() else {}


def _named(arrays: Any) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(arrays)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@jax.jit
def _sums(named: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sum of the bit patterns of each array modulo 2**32: any single changed value changes it."""

    def bits(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        return jnp.sum(jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32), dtype=jnp.uint32)

    return {name: bits(leaf) for name, leaf in named.items()}
