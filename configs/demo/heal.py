r"""Heals the pruned ranker: it learns the answers of the ranker that it was cut from, on train queries.

Command: python -m train.ranker --config configs/demo/heal.py --workdir work/demo/heal \
         --set base=work/demo/prune/model teacher=work/demo/ranker/model retriever=work/demo/encoder/model
Time: 6.4 minutes on two CPU cores.
Numbers: report.json.
"""

from train.loop import LoopConfig, OptimizerConfig
from train.ranker import RankerConfig, RankerLoss


def config() -> RankerConfig:
    return RankerConfig(
        dtype="bfloat16",
        base="work/demo/prune/model",
        layers=(),
        labels="",
        teacher="work/demo/ranker/model",
        retriever="work/demo/encoder/model",
        random_share=(0.5, 0.5),
        loss=RankerLoss(gold_weight=0.0, teacher_weight=1.0),
        check_queries=100,
        loop=LoopConfig(num_steps=80, checkpoint_every=40),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=10),
    )


def quick() -> RankerConfig:
    return RankerConfig(
        dtype="bfloat16",
        base="work/demo-quick/prune/model",
        layers=(),
        labels="",
        teacher="work/demo-quick/ranker/model",
        retriever="work/demo-quick/encoder/model",
        batch_queries=2,
        check_queries=4,
        loss=RankerLoss(gold_weight=0.0, teacher_weight=1.0),
        loop=LoopConfig(num_steps=6),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=2),
    )
