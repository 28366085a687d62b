"""What a way of scoring adds to the memory of a process: weights, programs and what is held while it scores.

Each is measured in a process of its own, started for it, so that nothing else is counted.
"""

import concurrent.futures
import gc
import importlib
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from train.ways import Request, Way

STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def added_bytes(
    make: Callable[[], Way], requests: Sequence[Request], libraries: Sequence[str] = ()
) -> int | None:
    """The most that a process has resident while it scores the requests, over what it had before `make`.

    The second pass counts: compiling is over then. `libraries` are imported first and so not counted. None where the
    system does not tell (only Linux does), and on accelerators, whose memory is not the process's.
    """
    if jax.default_backend() != "cpu" or not RESET_PEAK.exists():
        return None
    with concurrent.futures.ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is the parent's
    ) as pool:
        return pool.submit(_measure, make, requests, libraries).result()


def _measure(make: Callable[[], Way], requests: Sequence[Request], libraries: Sequence[str]) -> int:
    for library in libraries:
        importlib.import_module(library)
    jax.devices()
    gc.collect()
    before = _resident("VmRSS")
    way = make()
    for request in requests:
        way.score(request)
    gc.collect()
    RESET_PEAK.write_text("5", encoding="ascii")
    for request in requests:
        way.score(request)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """A line of the process's status, in bytes."""
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
