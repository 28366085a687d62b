"""The demo's encoder: MiniLM, one epoch of the train queries with five documents each.

Command: python -m train.encoder --config configs/demo/encoder.py --workdir work/demo/encoder
Time: 4.5 minutes on two cores of 95 GFLOP/s each, nothing compiled before.
Numbers: see report.json, before and after.
"""

from train.encoder import EncoderConfig
from train.loop import LoopConfig, OptimizerConfig


def config() -> EncoderConfig:
    return EncoderConfig(
        dtype="bfloat16",
        loop=LoopConfig(num_steps=92),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=10, weight_decay=0.01),
    )


def quick() -> EncoderConfig:
    return EncoderConfig(
        dtype="bfloat16",
        batch_queries=8,
        documents_per_query=3,
        loop=LoopConfig(num_steps=6),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=2),
    )
