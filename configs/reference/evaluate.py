r"""The reference table: every system on all test queries, the judge on 100 of them.

Command: python -m train.evaluate --config configs/reference/evaluate.py --workdir work/reference/evaluate \
         --set bundle=work/reference/export/bundle judge=work/reference/judge/model \
         other_rankers=judge-labels-only=work/reference/ranker_judge/model
Time: 14 minutes on two cores of 95 GFLOP/s each (quick: one minute, 8 queries).
Numbers: docs/results/reference, of the encoder as first stage; not run again since it is hybrid.
"""

from configs.demo import evaluate
from train.evaluate import EvaluateConfig


def config() -> EvaluateConfig:
    return EvaluateConfig(
        dtype="bfloat16",
        bundle="work/reference/export/bundle",
        judge="work/reference/judge/model",
    )


def quick() -> EvaluateConfig:
    return evaluate.quick()
