"""Strictness for every test: shapes and dtypes are checked at each call, and nothing is promoted silently.

Tests see one CPU device: what needs eight starts `tests/eight_devices.py`, so that no other test pays for them. What
one test has compiled is there for all others of the run, and for the processes that tests start. The fixtures are a
batcher's, whose time passes when told to (see `tests/jobs.py`).
"""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxsearch-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import threading

import jax
import jaxtyping
import pytest

from serve.batcher import Batcher
from tests.jobs import Clock, blocked

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("jaxsearch", "beartype.beartype")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def batcher(clock):
    batcher = Batcher(max_queue_tokens=100, clock=clock)
    yield batcher
    batcher.close()


@pytest.fixture
def gate(batcher):
    """The device thread is busy until the gate is set."""
    started, gate = threading.Event(), threading.Event()
    batcher.submit(blocked(started, gate), 10)
    assert started.wait(10)
    yield gate
    gate.set()
