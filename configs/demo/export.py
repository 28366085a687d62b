r"""The demo's bundle: encoder, ranker, index, documents and fitted orders in one folder.

Command: python -m train.export --config configs/demo/export.py --workdir work/demo/export \
         --set encoder=work/demo/encoder/model ranker=work/demo/ranker/model index=work/demo/index/index
Time: 4 minutes on two cores, other work beside it (quick: half a minute).
Numbers: report.json has each order's NDCG@10 on validation queries, which one is served and why, the held-out
         calibration error, and how many known answers the server will check.
"""

import dataclasses

from train.export import ExportConfig


def config() -> ExportConfig:
    return ExportConfig(
        name="onet",
        encoder="work/demo/encoder/model",
        ranker="work/demo/ranker/model",
        index="work/demo/index/index",
    )


def quick() -> ExportConfig:
    return dataclasses.replace(
        config(),
        encoder="work/demo-quick/encoder/model",
        ranker="work/demo-quick/ranker/model",
        index="work/demo-quick/index/index",
        validation_queries=6,
        rank_depth=5,
    )
