"""The reference judge: SmolLM2-135M + LoRA on 1,280 graded pairs, short view.

Command: python -m train.judge --config configs/reference/judge.py --workdir work/reference/judge
Time: about 9 minutes on two cores of 95 GFLOP/s each (quick: one minute).
Numbers: weighted kappa with its interval in report.json and in docs/results once measured.
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
