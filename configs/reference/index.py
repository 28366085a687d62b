r"""The reference index: every document's embedding by the reference encoder.

Command: python -m train.index --config configs/reference/index.py --workdir work/reference/index \
         --set encoder=work/reference/encoder/model
Time: seconds.
Numbers: none; the table of `configs/reference/evaluate.py` says how well it retrieves.
"""

from configs.demo import index
from train.index import IndexConfig


def config() -> IndexConfig:
    return IndexConfig(encoder="work/reference/encoder/model")


def quick() -> IndexConfig:
    return index.quick()
