"""Compiled programs beside a bundle, so that a replica on a machine of the same kind starts without compiling.

`programs/<machine>/` in the bundle's folder holds entries of JAX's persistent compilation cache and `programs.json`
with their sha256; the machine's name says what a program depends on. They belong to no revision: without them, or where
they are damaged, the server compiles. Not here: which programs there are (`engine`).
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxsearch.bundle import PROGRAMS
from jaxsearch.errors import InputError
from jaxsearch.files import read_object, replace_folder, sha256_hex, write_json

LISTED = "programs.json"


def machine_name() -> str:
    """Backend and device with a digest of versions, compiler flags and, on CPU, instruction sets."""
    device = jax.devices()[0]
    versions = [importlib.metadata.version(package) for package in ("jax", "jaxlib")]
    depends = [*versions, device.device_kind, os.environ.get("XLA_FLAGS", "")]
    if device.platform == "cpu":
        depends += [platform.machine(), _instruction_sets(), str(len(os.sched_getaffinity(0)))]
    digest = hashlib.sha256("\n".join(depends).encode()).hexdigest()[:12]
    return f"{device.platform}-{digest}"


def _instruction_sets() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def load_programs(bundle: str | Path, cache: Path) -> int:
    """Copies the bundle's programs for this machine into the compilation cache; how many there are.

    Raises: InputError when one is damaged; nothing is copied then.
    """
    folder = Path(bundle) / PROGRAMS / machine_name()
    if not (folder / LISTED).is_file():
        return 0
    listed = read_object(folder / LISTED)
    wrong = [name for name, digest in listed.items() if not _is_whole(folder / name, digest)]
    if wrong:
        raise InputError(f"{folder}: {len(wrong)} of {len(listed)} compiled programs are damaged: {wrong[0]}")
    cache.mkdir(parents=True, exist_ok=True)
    for name in listed:
        if not (cache / name).exists():
            temporary = cache / f".{name}.{uuid.uuid4().hex}"
            shutil.copyfile(folder / name, temporary)
            os.replace(temporary, cache / name)
    return len(listed)


def _is_whole(path: Path, digest: object) -> bool:
    return path.is_file() and sha256_hex(path) == digest


@contextlib.contextmanager
def saved_programs(bundle: str | Path) -> Iterator[Path]:
    """A cache folder; what is in it at the end stands in the bundle's folder for this machine, whole or not at all.

    Raises: InputError when the bundle's folder cannot be written.
    """
    folder = Path(bundle) / PROGRAMS / machine_name()
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        part.mkdir(parents=True)
        yield part
        names = sorted(path.name for path in part.iterdir() if path.name.endswith("-cache"))
        write_json(part / LISTED, {name: sha256_hex(part / name) for name in names})
        replace_folder(part, folder)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}); copy the bundle to where you may"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
