"""What a way adds to a process, in bytes that are known."""

import functools

import numpy as np
import pytest

from jaxsearch.data.prompts import PromptTokens
from train.memory import added_bytes
from train.ways import Request, Way

MEBIBYTE = 2**20
REQUEST = Request("", [], PromptTokens((), [], []))


def hold(mebibytes):
    """Kept from when the way is made on."""
    held = np.ones(mebibytes * MEBIBYTE, np.uint8)
    return Way(lambda request: held[:1])


def work(mebibytes):
    """Taken for a moment in every request."""
    return Way(lambda request: np.ones(mebibytes * MEBIBYTE, np.uint8)[:1].copy())


@pytest.mark.parametrize("make", [hold, work])
def test_what_is_held_and_what_is_worked_with_count_once(make):
    least, most = (added_bytes(functools.partial(make, size), [REQUEST] * 3) for size in (1, 201))
    assert least is not None
    assert most is not None
    assert least < 8 * MEBIBYTE  # measured 1.0 MiB
    assert most - least == pytest.approx(200 * MEBIBYTE, abs=4 * MEBIBYTE)  # measured 199.9 and 200.0 MiB


def test_libraries_that_are_imported_first_do_not_count():
    alone, imported = (
        added_bytes(import_sklearn, [REQUEST], libraries) for libraries in ((), ("sklearn.linear_model",))
    )
    assert alone is not None
    assert imported is not None
    assert imported < alone / 2  # measured 0.004 of 80 MiB


def import_sklearn():
    import sklearn.linear_model

    return Way(lambda request: np.zeros(len(sklearn.linear_model.__name__)))
