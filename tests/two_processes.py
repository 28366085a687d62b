"""One of several processes of the toy training, on one CPU device each.

    python tests/two_processes.py WORKDIR NUM_STEPS PORT NUM_PROCESSES PROCESS_ID [SIGNAL_NAME AT_BATCH]

Process 0 writes `WORKDIR/params.npz` at the end.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxsearch.errors import InputError
from train.processes import is_main, join, supervise


def main(workdir: str, num_steps: str, port: str, num_processes: str, process_id: str, *kill: str) -> None:
    if int(num_processes) > 1:
        supervise()
        join(f"127.0.0.1:{port}", int(num_processes), int(process_id))
    from tests.toy_training import batches, train

    def interrupted(start: int) -> Iterator[dict[str, np.ndarray]]:
        for number, batch in enumerate(batches(start), start):
            if kill and number == int(kill[1]):
                os.kill(os.getpid(), signal.Signals[kill[0]])
            yield batch

    params = train(workdir, int(num_steps), interrupted)
    if is_main():
        np.savez(Path(workdir) / "params.npz", **params)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
