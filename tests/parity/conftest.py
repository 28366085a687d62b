"""Equality with `transformers`: needs torch, so it is a run of its own (`make parity`)."""

import pytest


def pytest_collection_modifyitems(items):
    """Warnings of torch and transformers about themselves are not ours to mend."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))
