"""A small config, as tests of the command line need it."""

import dataclasses
from pathlib import Path
from typing import Literal

from train.config import Count, Share


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: Share = 0.1
    """How fast."""
    schedule: Literal["cosine", "linear"] = "cosine"


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    steps: Count
    """How long, in
    optimiser steps."""
    name: str = "toy"
    is_deep: bool = False
    limit: int | None = None
    weights: tuple[float, ...] = (1.0, 2.0)
    pair: tuple[int, str] = (1, "a")
    folder: Path = Path("here")
    inner: Inner = dataclasses.field(default_factory=Inner)


CONFIG = '''"""Note."""
from tests.toy_config import ToyConfig

def config():
    return ToyConfig(steps=100)

def quick():
    return ToyConfig(steps=2)
'''
