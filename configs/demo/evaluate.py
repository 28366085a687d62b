r"""The demo's table: every system on the test queries, the judge on 30 of them.

Command: python -m train.evaluate --config configs/demo/evaluate.py --workdir work/demo/evaluate \
         --set encoder=work/demo/encoder/model judge=work/demo/judge/model ranker=work/demo/ranker/model
Time: 3.3 minutes on two cores of 95 GFLOP/s each, nothing compiled before (quick: one minute, 8 queries).
Numbers: whatever the table says; the demo's budget orders BM25, MiniLM and the encoder, not the stages after them.
"""

from train.evaluate import EvaluateConfig


def config() -> EvaluateConfig:
    return EvaluateConfig(
        dtype="bfloat16",
        encoder="work/demo/encoder/model",
        judge="work/demo/judge/model",
        ranker="work/demo/ranker/model",
        depth=10,
        judge_queries=30,
        validation_queries=30,
    )


def quick() -> EvaluateConfig:
    return EvaluateConfig(
        dtype="bfloat16",
        encoder="work/demo-quick/encoder/model",
        judge="work/demo-quick/judge/model",
        ranker="work/demo-quick/ranker/model",
        num_queries=8,
        depth=5,
        judge_queries=4,
        validation_queries=4,
        num_samples=200,
    )
