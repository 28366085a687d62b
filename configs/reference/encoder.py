"""The reference encoder: MiniLM, three rounds of one epoch, each with hard negatives of the model so far.

Command: python -m train.encoder --config configs/reference/encoder.py --workdir work/reference/encoder
Time: about 10 minutes on two cores (quick: 20 seconds).
Numbers: validation NDCG@10 and recall@100 before and after each round in report.json.
"""

import dataclasses

from configs.demo import encoder
from train.encoder import EncoderConfig
from train.loop import LoopConfig


def config() -> EncoderConfig:
    return dataclasses.replace(encoder.config(), rounds=3, loop=LoopConfig(num_steps=276))


def quick() -> EncoderConfig:
    return encoder.quick()
