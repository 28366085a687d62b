"""Several processes that train as one: how they join, who speaks for all, and what they decide together.

Each process runs the same launcher on its own devices; `jax.jit` over one mesh of all devices makes them one training.
Process 0 writes files and speaks; checkpoints are written by all. JAX ends a process at once when another one died,
which leaves no time for words: `supervise` says them from a parent.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxsearch.errors import InputError

SHUTDOWN_SECONDS = 24 * 3600
"""How long processes that are done wait for process 0, which still evaluates and writes."""
HEARTBEAT_SECONDS = 30
"""After this long without a sign of life a process counts as dead, and the others stop."""
CHILD = "JAXSEARCH_SUPERVISED"
"""Set for the process that a supervisor has started."""


def run_child(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """The exit status of a command; SIGTERM, or SIGINT to this process alone, tells it to save and stop."""
    process, is_told = None, False

    def tell(*_: object) -> None:
        nonlocal is_told
        is_told = True  # before the child is there: it is told when it is
        if process is not None:
            process.terminate()

    previous = signal.signal(signal.SIGTERM, tell)
    try:
        process = subprocess.Popen(command, env=environment)
        if is_told:
            process.terminate()
        return process.wait()
    except KeyboardInterrupt:
        if process is not None:
            process.terminate()  # a terminal's Ctrl-C has reached the child too, which keeps to the first signal
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        if process is not None:
            process.wait()


def supervise() -> None:
    """Runs this very command once more, as the process that computes, and explains its end; returns in that process.

    Raises:
        InputError: it was ended because another process of the training died or cannot be reached.
        SystemExit: it ended in another way, with its status.
    """
    if os.environ.get(CHILD):
        return
    status = run_child([sys.executable, *sys.orig_argv[1:]], os.environ | {CHILD: "1"})
    if status == -signal.SIGABRT:
        raise InputError(
            "another process of this training died or cannot be reached: start all of them again, the training goes on "
            "from its last checkpoint (if it was this process itself that failed, its reason stands above)"
        )
    raise SystemExit(status if status >= 0 else 128 - status)


def join(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes; must come before any computation.

    Args:
        coordinator: host:port of process 0, or "auto" where the cluster says all (SLURM, TPU pods, Open MPI).
    Raises:
        InputError: the processes do not find each other.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address=None if coordinator == "auto" else coordinator,
            num_processes=num_processes,
            process_id=process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"--coordinator {coordinator}: the processes do not find each other ({reason})"
        ) from error


def is_main() -> bool:
    """Whether this process writes files and speaks for all; asks no device of a launcher that uses none."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def leave_to_main() -> None:
    """Ends the other processes' work: what follows needs one."""
    if not is_main():
        raise SystemExit(0)


def agree(number: int) -> int:
    """The largest of the processes' numbers; all of them must ask at the same step."""
    return int(np.max(multihost_utils.process_allgather(np.asarray(number, np.int32))))
