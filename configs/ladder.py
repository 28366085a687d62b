"""The ladder of scoring on the demo's ranker: torch, ours from one by one to the shared prefix, the encoder alone.

Command: python -m train.ladder --config configs/ladder.py --workdir work/ladder
         in the environment of `make parity` (the rungs of torch need it), or `make ladder`
Time: 24 minutes on two CPU cores with window_seconds=40 and two pruned rankers.
Numbers: docs/results/ladder, with those; they are two of the sweep's, "neurons -50 %" and the one healed for 1,280
         steps. The demo's ranker reads the short view, so that no rung has less text. For rankers that `train.prune`
         made: --set pruned=work/demo/prune/model
"""

from train.ladder import LadderConfig


def config() -> LadderConfig:
    return LadderConfig()


def quick() -> LadderConfig:
    return LadderConfig(
        ranker="work/demo-quick/ranker/model",
        retriever="work/demo-quick/encoder/model",
        encoder="work/demo-quick/encoder/model",
        num_queries=4,
        depth=4,
        timed_queries=2,
        window_seconds=2.0,
    )
