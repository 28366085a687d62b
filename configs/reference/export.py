r"""The reference bundle: encoder, ranker, index, documents and calibration in one folder.

Command: python -m train.export --config configs/reference/export.py --workdir work/reference/export \
         --set encoder=work/reference/encoder/model ranker=work/reference/ranker/model \
         index=work/reference/index/index
Time: a minute on two cores (quick: seconds).
Numbers: report.json has the held-out calibration error and how many known answers the server will check.
"""

import dataclasses

from configs.demo import export
from train.export import ExportConfig


def config() -> ExportConfig:
    return dataclasses.replace(
        export.config(),
        encoder="work/reference/encoder/model",
        ranker="work/reference/ranker/model",
        index="work/reference/index/index",
    )


def quick() -> ExportConfig:
    return export.quick()
