"""Scoring 50 documents a query beside torch: the demo's ranker (12 layers of SmolLM2), about 50 + 150 tokens.

Command: python -m train.bench --config configs/bench.py --workdir work/bench
         in the environment of `make parity` (it needs torch), or `make bench`; the extra `llama` adds llama.cpp
Time: 10 minutes on two CPU cores with repeats=3 and random_requests=2000, llama.cpp's six rows included.
Numbers: docs/results/bench, with these two; its last table by a run of its own with repeats=7.
"""

from train.bench import BenchConfig


def config() -> BenchConfig:
    return BenchConfig(layers=tuple(range(12)))


def quick() -> BenchConfig:
    return BenchConfig(layers=(0, 1), num_items=8, repeats=1, random_requests=50)
