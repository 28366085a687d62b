r"""The reference ranker: 12 layers of SmolLM2, 19,200 pairs, judge's labels + gold + list-wise term.

Command: python -m train.ranker --config configs/reference/ranker.py --workdir work/reference/ranker \
         --set labels=work/reference/label retriever=work/reference/encoder/model
Time: 50 minutes on two cores of 95 GFLOP/s each, other work beside it (quick: one minute).
      `metrics.jsonl` has NDCG@10 every 100 steps: the learning curve.
Numbers: on the candidates of the encoder alone (.378), NDCG@10 .385 and .393 with it: docs/results/reference. Behind
         the hybrid first stage it has not been run yet.
"""

import dataclasses

from configs.demo import ranker
from train.loop import LoopConfig
from train.ranker import RankerConfig


def config() -> RankerConfig:
    return dataclasses.replace(
        ranker.config(),
        labels="work/reference/label",
        retriever="work/reference/encoder/model",
        random_share=(1.0, 0.0),
        check_queries=40,
        loop=LoopConfig(num_steps=600, checkpoint_every=100, evaluate_every=100),
    )


def quick() -> RankerConfig:
    return ranker.quick()
