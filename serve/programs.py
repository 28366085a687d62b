"""Compiled programs beside a bundle, so that a replica on a machine of the same kind starts without compiling.

`programs/<machine>/` in the bundle's folder holds entries of JAX's persistent compilation cache and `programs.json`
with their sha256; the machine's name says what a program depends on. They belong to no revision, and they are machine
code: a server uses them only where it is told to. Not here: which programs there are (`engine`).
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.monitoring

from jaxsearch.bundle import PROGRAMS
from jaxsearch.errors import InputError
from jaxsearch.files import read_object, replace_folder, sha256_hex, write_json

LISTED = "programs.json"
ENTRY = "-cache"
"""How the names of the cache's entries end."""


CACHE_EVENTS = {
    "/jax/compilation_cache/compile_requests_use_cache": 1,
    "/jax/compilation_cache/cache_hits": -1,
}
"""What `jax.monitoring` says of each program that is asked of the cache, and of each that it had."""


class Misses:
    """How many programs had to be compiled since this was made, as the compilation cache did not have them."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_listener(self._on_event)

    def close(self) -> None:
        """Stops listening; the count stays readable."""
        jax.monitoring.unregister_event_listener(self._on_event)

    def _on_event(self, event: str, **_: str | int) -> None:
        with self._lock:
            self.count += CACHE_EVENTS.get(event, 0)


def machine_name() -> str:
    """Backend and device with a digest of versions, compiler flags and, on CPU, instruction sets and cores."""
    device = jax.devices()[0]
    versions = [importlib.metadata.version(package) for package in ("jax", "jaxlib")]
    depends = [*versions, device.device_kind, os.environ.get("XLA_FLAGS", "")]
    if device.platform == "cpu":
        depends += [platform.machine(), _instruction_sets(), str(_num_cores())]
    digest = hashlib.sha256("\n".join(depends).encode()).hexdigest()[:12]
    return f"{device.platform}-{digest}"


def _num_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _instruction_sets() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def load_programs(bundle: str | Path, cache: Path) -> int:
    """Copies the bundle's programs for this machine into the compilation cache; how many files that were.

    Programs with the same text, as searches with and without filters are for one query, share a file.

    Raises: InputError when there are none for it, one is damaged, or they cannot be copied.
    """
    folder = Path(bundle) / PROGRAMS / machine_name()
    hint = "leave them with --save-programs"
    if not (folder / LISTED).is_file():
        raise InputError(f"{bundle} has no programs for machines like this one ({folder.name}); {hint}")
    listed = read_object(folder / LISTED, hint=hint)
    if wrong := _damaged(folder, listed):
        raise InputError(f"{folder}: {len(wrong)} of {len(listed)} compiled programs are damaged; {hint}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for name in listed:
            if not (cache / name).exists():
                _copy(folder / name, cache / name)
    except OSError as error:
        raise InputError(f"cannot copy programs from {folder} to {cache} ({error.strerror})") from None
    return len(listed)


def _damaged(folder: Path, listed: Mapping[str, Any]) -> list[str]:
    """Those that are not entries right in the folder, or not what the list says."""

    def is_whole(name: str) -> bool:
        path = folder / name
        is_entry = Path(name).name == name and name.endswith(ENTRY) and not path.is_symlink()
        return is_entry and path.is_file() and sha256_hex(path) == listed[name]

    return [name for name in listed if not is_whole(name)]


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def saved_programs(bundle: str | Path) -> Iterator[Path]:
    """A cache folder; what is in it at the end joins the bundle's programs for this machine, all or nothing.

    Raises: InputError when the bundle's folder cannot be written, or nothing was compiled into the cache.
    """
    folder = Path(bundle) / PROGRAMS / machine_name()
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    refusal = f"cannot write to {folder}; copy the bundle to where you may"
    try:
        try:
            part.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{refusal} ({error.strerror})") from None
        yield part
        names = {path.name for path in part.iterdir() if path.name.endswith(ENTRY)}
        if not names:
            raise InputError("JAX wrote nothing to its compilation cache: is it switched off?")
        try:
            before = read_object(folder / LISTED) if (folder / LISTED).is_file() else {}
            for name in before.keys() - names - {*_damaged(folder, before)}:  # of a server with other options
                shutil.copyfile(folder / name, part / name)
                names.add(name)
            write_json(part / LISTED, {name: sha256_hex(part / name) for name in sorted(names)})
            replace_folder(part, folder)
        except OSError as error:
            raise InputError(f"{refusal} ({error.strerror})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):  # stays where it holds something
            folder.parent.rmdir()
