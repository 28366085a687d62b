r"""The demo's ranker with half of its neurons and three of its twelve layers gone, not healed yet.

Command: python -m train.prune --config configs/demo/prune.py --workdir work/demo/prune \
         --set ranker=work/demo/ranker/model retriever=work/demo/encoder/model
Time: 8.4 minutes on two CPU cores.
Numbers: report.json; `configs/demo/heal.py` wins back what is lost.
"""

from train.prune import PruneConfig, Search


def config() -> PruneConfig:
    return PruneConfig(
        ranker="work/demo/ranker/model",
        retriever="work/demo/encoder/model",
        drop_layers=3,
        mlp_dim=768,
        check_queries=100,
    )


def quick() -> PruneConfig:
    return PruneConfig(
        ranker="work/demo-quick/ranker/model",
        retriever="work/demo-quick/encoder/model",
        drop_layers=1,
        num_kv_heads=2,
        search=Search(num_swaps=1),
        calibration_queries=16,
        layer_queries=2,
        check_queries=4,
    )
