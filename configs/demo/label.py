r"""The demo's labels: the judge grades 480 pairs of 60 train queries.

Command: python -m train.label --config configs/demo/label.py --workdir work/demo/label \
         --set judge=work/demo/judge/model
Time: 0.9 minutes on two cores of 95 GFLOP/s each, nothing compiled before.
Numbers: none; the ranker's table says what the labels are worth.
"""

from train.label import LabelConfig


def config() -> LabelConfig:
    return LabelConfig(judge="work/demo/judge/model", dtype="bfloat16", num_queries=60)


def quick() -> LabelConfig:
    return LabelConfig(judge="work/demo-quick/judge/model", dtype="bfloat16", num_queries=16, shard_pairs=64)
