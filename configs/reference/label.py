r"""The reference labels: the judge grades 2,560 pairs of 320 train queries.

Command: python -m train.label --config configs/reference/label.py --workdir work/reference/label \
         --set judge=work/reference/judge/model
Time: 4.7 minutes on two cores of 95 GFLOP/s each (quick: half a minute).
Numbers: none; the row of the ranker trained on these labels alone says what they are worth.
"""

from configs.demo import label
from train.label import LabelConfig


def config() -> LabelConfig:
    return LabelConfig(judge="work/reference/judge/model", dtype="bfloat16", num_queries=320)


def quick() -> LabelConfig:
    return label.quick()
