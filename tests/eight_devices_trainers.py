"""The trainers that evaluate while they train, on eight simulated devices,
started by test_trainers.py in a process of its own.

    python tests/eight_devices_trainers.py FOLDER

Prints the number of devices; the trained models are under FOLDER/trained.
"""

import sys
from pathlib import Path

import jax

from tests.tiny_bundle import write_parts
from tests.tiny_collection import write_collection
from train import encoder, prune, ranker
from train.loop import LoopConfig
from train.step import OptimizerConfig


def prune_config(folder: Path) -> prune.PruneConfig:
    return prune.PruneConfig(
        ranker=str(folder / "ranker"),
        collection=str(folder / "data"),
        vertical=str(folder / "vertical"),
        retriever=str(folder / "encoder"),
        mlp_dim=10,
        num_heads=1,
        calibration_queries=4,
        per_query=4,
        check_queries=3,
        check_depth=4,
    )


def main(folder: Path) -> None:
    parts = write_parts(folder)
    common = {
        "collection": str(write_collection(folder / "data")),
        "vertical": str(parts["vertical"]),
        "loop": LoopConfig(num_steps=2),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
    }
    mined = {"retriever": str(parts["encoder"]), "base": str(parts["ranker"]), "check_queries": 3}
    encoder.main(
        encoder.EncoderConfig(
            backbone=str(parts["encoder"]),
            batch_queries=8,
            documents_per_query=3,
            max_query_tokens=24,
            max_document_tokens=32,
            **common,
        ),
        folder / "trained" / "encoder",
    )
    ranker.main(
        ranker.RankerConfig(
            layers=(0,),
            labels="",
            batch_queries=8,
            candidates_per_query=4,
            check_depth=4,
            **mined,
            max_shared_tokens=80,
            max_item_tokens=64,
            **common,
        ),
        folder / "trained" / "ranker",
    )
    prune.main(prune_config(folder), folder / "trained" / "prune")
    print(jax.device_count())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in ("encoder", "ranker"):
        (folder / "trained" / name).mkdir(parents=True)
    main(folder)
