"""The folder that a launcher works in: made, held by one process at a time, and never begun anew with other inputs."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsearch.errors import InputError
from jaxsearch.files import read_object, write_json
from train.config import describe
from train.processes import is_main

FREE_KEYS = (
    "log_every",
    "checkpoint_every",
    "evaluate_every",
    "keep_checkpoints",
    "provider",
    "data",
    "fsdp",
    "tensor",
)
"""Last parts of config keys that may differ when a run goes on: they do not change what it computes."""


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[None]:
    """Holds the folder against other launchers; freed when this process ends, however it does.

    Raises:
        InputError: another process holds it.
    """
    try:
        handle = (workdir / ".lock").open("w")
    except OSError as error:
        raise InputError(f"--workdir {workdir}: cannot be written to ({error.strerror})") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process works in {workdir}: wait until it is done, or choose another --workdir"
            ) from None
        except OSError as error:
            raise InputError(
                f"--workdir {workdir}: its file system has no locks ({error.strerror}); choose another"
            ) from None
        yield


def claim(workdir: Path, config: Any, **made_from: str | int) -> None:
    """Notes in `run.json` what a run is made from, and refuses a folder that was begun with something else.

    A folder in which nothing was made yet, because the run was refused, is not begun.

    Args:
        made_from: fingerprints and versions of the inputs, beside the config's own values.
    Raises:
        InputError: the folder's run differs; the keys that do are named.
    """
    if not is_main():
        return
    values = {
        key: str(value) for key, value in describe(config).items() if key.split(".")[-1] not in FREE_KEYS
    }
    identity = values | {f"{name} (fingerprint)": str(value) for name, value in made_from.items()}
    path = workdir / "run.json"
    if not path.exists() or not _is_begun(workdir):
        write_json(path, identity)
        return
    found = read_object(path, hint="delete it and what was made beside it, or choose another --workdir")
    changed = sorted(key for key in identity | found if found.get(key) != identity.get(key))
    if changed:
        raise InputError(
            f"{workdir} was begun with another {', '.join(changed[:6])}: choose another --workdir, or delete this one"
        )


BOOKKEEPING = ("run.json", ".lock", "metrics.jsonl", "labels.json")
"""Files that a run leaves before it has made anything."""


def _is_begun(workdir: Path) -> bool:
    return any(
        path.is_file()
        and path.name not in BOOKKEEPING
        and "tensorboard" not in path.relative_to(workdir).parts
        for path in workdir.rglob("*")
    )
