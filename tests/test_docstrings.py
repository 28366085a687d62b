"""Examples in docstrings hold."""

import doctest
import importlib
import inspect

import pytest
from test_imports import MODULES

from jaxsearch import losses

WITH_EXAMPLES = [name for name, path in MODULES.items() if ">>>" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_of_a_module_hold(module):
    failed, attempted = doctest.testmod(importlib.import_module(module))
    assert failed == 0
    assert attempted > 0


def test_every_loss_has_an_example():
    public = [
        function
        for name, function in vars(losses).items()
        if callable(function) and function.__module__ == losses.__name__ and not name.startswith("_")
    ]
    without = [function.__name__ for function in public if ">>>" not in (inspect.getdoc(function) or "")]
    assert public
    assert without == []
