r"""The demo's ranker: the first 12 layers of SmolLM2, 2,560 pairs, judge's labels + gold + list-wise term.

Command: python -m train.ranker --config configs/demo/ranker.py --workdir work/demo/ranker \
         --set labels=work/demo/label retriever=work/demo/encoder/model
Time: 6.0 minutes on two cores of 95 GFLOP/s each, nothing compiled before.
Numbers: see report.json; so few pairs do not reach the encoder, `configs/reference/ranker.py` is the real recipe.
         Why the first 12 layers: docs/results/layers.
"""

from train.loop import LoopConfig, OptimizerConfig
from train.ranker import RankerConfig


def config() -> RankerConfig:
    return RankerConfig(
        dtype="bfloat16",
        labels="work/demo/label",
        retriever="work/demo/encoder/model",
        check_queries=20,
        loop=LoopConfig(num_steps=80, checkpoint_every=40),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=10),
    )


def quick() -> RankerConfig:
    return RankerConfig(
        dtype="bfloat16",
        labels="work/demo-quick/label",
        retriever="work/demo-quick/encoder/model",
        layers=(0, 1, 2, 3),
        batch_queries=2,
        check_queries=4,
        loop=LoopConfig(num_steps=6),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2),
    )
