"""JSON files read with one clear error and written whole, files hashed, folders put in place whole."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from jaxsearch.errors import InputError


def read_json(path: str | os.PathLike[str], *, hint: str = "") -> Any:
    """The value of a JSON file.

    Args: `hint` says in the error what to do about it.
    Raises: InputError when the file is missing, cannot be read, is not UTF-8 or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise InputError(f"cannot read {path} ({reason}){hint and f'; {hint}'}") from error


def read_object(path: str | os.PathLike[str], *, hint: str = "") -> dict[str, Any]:
    """As `read_json`, for a file that must hold a JSON object."""
    value = read_json(path, hint=hint)
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a {type(value).__name__} where a JSON object is expected{hint and f'; {hint}'}"
        )
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON so that a reader sees the whole old file or the whole new one.

    Raises:
        TypeError: `value` holds what JSON does not know. ValueError: it holds NaN or an infinity.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sha256_hex(path: str | os.PathLike[str]) -> str:
    """64 hex digits over a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(temporary: Path, directory: Path) -> None:
    """Puts a finished folder in the place of another; the old one is removed only after that."""
    old = temporary.with_name(temporary.name + ".old")
    if directory.exists():
        os.replace(directory, old)
    os.replace(temporary, directory)
    shutil.rmtree(old, ignore_errors=True)
