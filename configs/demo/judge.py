"""The demo's judge: SmolLM2-135M + LoRA on 320 graded pairs of O*NET activities, short view.

Command: python -m train.judge --config configs/demo/judge.py --workdir work/demo/judge
Time: 3.2 minutes on two cores of 95 GFLOP/s each, nothing compiled before.
Numbers: see report.json; so few pairs teach how often each grade occurs, and nothing more (kappa 0 on test pairs).
"""

from train.judge import JudgeConfig
from train.loop import LoopConfig, OptimizerConfig


def config() -> JudgeConfig:
    return JudgeConfig(
        dtype="bfloat16",
        check_queries=15,
        loop=LoopConfig(num_steps=20),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=5),
    )


def quick() -> JudgeConfig:
    return JudgeConfig(
        dtype="bfloat16",
        batch_pairs=8,
        check_queries=4,
        loop=LoopConfig(num_steps=6),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=2),
    )
