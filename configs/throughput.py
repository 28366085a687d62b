"""Training steps beside torch's: the demo's ranker and encoder, float32 and bfloat16.

Command: python -m train.throughput --config configs/throughput.py --workdir work/throughput
         in the environment of `make parity` (it needs torch), or `make throughput`
Time: 12 minutes on two CPU cores.
Numbers: docs/results/throughput.
"""

from configs.demo import encoder, ranker
from train.throughput import ThroughputConfig


def config() -> ThroughputConfig:
    return ThroughputConfig(ranker=ranker.config(), encoder=encoder.config())


def quick() -> ThroughputConfig:
    return ThroughputConfig(ranker=ranker.quick(), encoder=encoder.quick(), num_batches=1, repeats=2)
