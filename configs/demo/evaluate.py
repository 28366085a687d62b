r"""The demo's table: what the bundle serves and all that it is made of, on the test queries, the judge on 30 of them.

Command: python -m train.evaluate --config configs/demo/evaluate.py --workdir work/demo/evaluate \
         --set bundle=work/demo/export/bundle judge=work/demo/judge/model
Time: 12 minutes on two cores, other work beside it (quick: one minute, 8 queries).
Numbers: docs/results/demo.
"""

from train.evaluate import EvaluateConfig


def config() -> EvaluateConfig:
    return EvaluateConfig(
        dtype="bfloat16",
        bundle="work/demo/export/bundle",
        judge="work/demo/judge/model",
        judge_queries=30,
    )


def quick() -> EvaluateConfig:
    return EvaluateConfig(
        dtype="bfloat16",
        bundle="work/demo-quick/export/bundle",
        judge="work/demo-quick/judge/model",
        num_queries=8,
        judge_queries=4,
        num_samples=200,
    )
