r"""The reference ranker without any gold: the judge's labels alone, to see what they carry.

Command: python -m train.ranker --config configs/reference/ranker_judge.py --workdir work/reference/ranker_judge \
         --set labels=work/reference/label retriever=work/reference/encoder/model
Time: 7.7 minutes on two cores of 95 GFLOP/s each (quick: one minute); 2,560 pairs.
Numbers: NDCG@10 .300 on the test queries, against .378 of the encoder whose best 20 it orders: docs/results/reference.
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
        use_gold=False,
        loop=LoopConfig(num_steps=80, checkpoint_every=40),
    )


def quick() -> RankerConfig:
    return dataclasses.replace(ranker.quick(), use_gold=False)
