"""Two processes as one training: the same parameters, and what happens when one of them dies."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_bundle import write_parts
from tests.tiny_collection import write_words
from tests.toy_training import train
from train.processes import run_child

ROOT = Path(__file__).parent
NUM_STEPS = 12
TIMEOUT_SECONDS = 150


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT.parent)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(workdir: Path, *, killed: int | None = None) -> list[tuple[int, str]]:
    """Exit status and error output of each process; `killed` dies while it makes batch 7."""
    port = free_port()
    processes = []
    for number in range(2):
        command = [sys.executable, ROOT / "two_processes.py", workdir, NUM_STEPS, port, 2, number]
        command += ["SIGKILL", 7] if number == killed else []
        processes.append(
            subprocess.Popen([*map(str, command)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        )
    told = [process.communicate(timeout=TIMEOUT_SECONDS)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


def assert_as_one_process(workdir: Path, whole: dict[str, np.ndarray]) -> None:
    with np.load(workdir / "params.npz") as params:
        for name, expected in whole.items():
            # measured maximum: 1.6e-7, from the order in which the two parts of a batch are added
            error = np.abs(params[name] - expected).max() / np.abs(expected).max()
            assert error < 1e-5, name


def test_two_processes_train_as_one_and_a_dead_one_stops_the_other(tmp_path):
    whole = train(tmp_path / "whole", NUM_STEPS)
    (tmp_path / "two").mkdir()
    both = run_two(tmp_path / "two")
    assert [status for status, _ in both] == [0, 0], both
    assert "training 12/12" in both[0][1]
    assert "training" not in both[1][1]  # one of them speaks
    assert_as_one_process(tmp_path / "two", whole)

    (tmp_path / "killed").mkdir()
    dead, left = run_two(tmp_path / "killed", killed=0)
    assert dead[0] == 128 + signal.SIGKILL
    assert left[0] != 0
    assert "another process of this training died or cannot be reached: start all of them again" in left[1]
    again = run_two(tmp_path / "killed")
    assert [status for status, _ in again] == [0, 0], again
    assert "resumed from step" in again[0][1]
    assert_as_one_process(tmp_path / "killed", whole)


def test_every_process_mines_the_same_candidates(tmp_path):
    write_parts(tmp_path / "models")
    folder = write_words(tmp_path / "collection")
    command = [sys.executable, ROOT / "two_processes_mining.py", free_port(), 2]
    processes = [
        subprocess.Popen(
            [*map(str, [*command, number, tmp_path / "models", folder])],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    found = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    first, second = (json.loads(text.splitlines()[-1]) for text in found)
    assert first == second
    assert [len(documents) for documents in first.values()] == [5, 5, 5]


CHILD = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("begun", flush=True)
time.sleep(60)
"""
PARENT = """
import signal, sys
from train.processes import run_child
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
run_child([sys.executable, "-c", *sys.argv[1:]])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_parent_alone_stops_the_child(tmp_path, number):
    command = [sys.executable, "-c", PARENT, CHILD, str(tmp_path / "stopped")]
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begun\n"
        parent.send_signal(number)
        parent.wait(TIMEOUT_SECONDS)
    assert (tmp_path / "stopped").exists()


def test_a_signal_that_comes_before_the_child_is_there_stops_it():
    class Signalled(dict):
        """An environment that is read when the child is about to be started."""

        def items(self):
            signal.raise_signal(signal.SIGTERM)
            return super().items()

    child = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert run_child(child, Signalled(os.environ)) == -signal.SIGTERM
