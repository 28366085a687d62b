"""kill -9 at random moments of a training: no moment changes what the run ends with.

    KILLS=20 python -m pytest tests/test_kill.py

`make test` tries few moments; KILLS sets how many. They fall between the first batch and the end, saves included.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.toy_training import train

ROOT = Path(__file__).parent
NUM_STEPS, BATCH_SECONDS = 24, 0.05
KILLS = int(os.environ.get("KILLS", "3"))


def start(workdir: Path) -> subprocess.Popen:
    """A run that has asked for its first batch."""
    command = [
        sys.executable,
        str(ROOT / "toy_training.py"),
        str(workdir),
        str(NUM_STEPS),
        "SLOW",
        str(BATCH_SECONDS),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, np.ndarray]:
    return train(tmp_path_factory.mktemp("whole"), NUM_STEPS)


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_run_killed_at_a_random_moment_ends_as_one_never_killed(tmp_path, whole, seed):
    moment = random.Random(seed).uniform(0.0, NUM_STEPS * BATCH_SECONDS)
    with start(tmp_path) as process:
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    with start(tmp_path) as process:
        _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    with np.load(tmp_path / "params.npz") as params:
        assert params.keys() == whole.keys()
        for name, expected in whole.items():
            np.testing.assert_array_equal(params[name], expected)
