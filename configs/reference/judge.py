"""The reference judge: SmolLM2-135M + LoRA on 1,280 graded pairs, short view.

Command: python -m train.judge --config configs/reference/judge.py --workdir work/reference/judge
Time: 11.5 minutes on two cores of 95 GFLOP/s each, other work beside it (quick: one minute).
Numbers: weighted kappa 0 with random negatives alone, as with half of them hard: it still gives one grade to all pairs.
         Its expected grade orders a query's pairs a little (AUC .56 on the 1,536 first of its labels).
"""

import dataclasses

from configs.demo import judge
from train.judge import JudgeConfig
from train.loop import LoopConfig


def config() -> JudgeConfig:
    return dataclasses.replace(
        judge.config(), random_share=1.0, check_queries=25, loop=LoopConfig(num_steps=80, checkpoint_every=20)
    )


def quick() -> JudgeConfig:
    return judge.quick()
