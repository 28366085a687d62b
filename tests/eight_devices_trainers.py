"""Every trainer on eight simulated devices, started by test_trainers.py in a process of its own.

    python tests/eight_devices_trainers.py FOLDER

Prints the number of devices; the trained models are under FOLDER/trained.
"""

import sys
from pathlib import Path

import jax

from tests.tiny_bundle import write_parts
from tests.tiny_collection import write_collection
from train import encoder, judge, ranker
from train.loop import LoopConfig
from train.step import OptimizerConfig


def main(folder: Path) -> None:
    parts = write_parts(folder)
    common = {
        "collection": str(write_collection(folder / "data")),
        "vertical": str(parts["vertical"]),
        "loop": LoopConfig(num_steps=2, evaluate_every=1),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
    }
    mined = {"retriever": str(parts["encoder"]), "base": str(parts["ranker"]), "check_queries": 3}
    limits = {"max_shared_tokens": 80, "max_item_tokens": 64}
    encoder.main(
        encoder.EncoderConfig(
            backbone=str(parts["encoder"]), rounds=2, batch_queries=8, documents_per_query=3, **common
        ),
        folder / "trained" / "encoder",
    )
    judge.main(
        judge.JudgeConfig(lora_rank=4, pairs_per_query=4, batch_pairs=8, **mined, **limits, **common),
        folder / "trained" / "judge",
    )
    ranker.main(
        ranker.RankerConfig(
            layers=(0,),
            labels="",
            batch_queries=8,
            candidates_per_query=4,
            check_depth=4,
            **mined,
            **limits,
            **common,
        ),
        folder / "trained" / "ranker",
    )
    print(jax.device_count())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in ("encoder", "judge", "ranker"):
        (folder / "trained" / name).mkdir(parents=True)
    main(folder)
