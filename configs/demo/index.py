r"""The demo's index: every document's embedding, searched exhaustively.

Command: python -m train.index --config configs/demo/index.py --workdir work/demo/index \
         --set encoder=work/demo/encoder/model
Time: seconds.
Numbers: none; the table of `configs/demo/evaluate.py` says how well it retrieves.
"""

from train.index import IndexConfig


def config() -> IndexConfig:
    return IndexConfig(encoder="work/demo/encoder/model")


def quick() -> IndexConfig:
    return IndexConfig(encoder="work/demo-quick/encoder/model")
