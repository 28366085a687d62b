r"""How much of the demo's ranker can go: neurons, layers and both, by three methods, and healed.

Command: python -m train.sweep --config configs/sweep.py --workdir work/sweep \
         --set prune.ranker=work/demo/ranker/model prune.retriever=work/demo/encoder/model
Time: 100 minutes on two CPU cores without the last point, 59 more to heal that and to measure all again; both beside
      other work.
Numbers: docs/results/pruning.
"""

import dataclasses

from configs.demo import heal, prune
from train.sweep import Point, SweepConfig

POINTS = (
    Point("neurons -50 %", mlp_dim=768),
    Point("neurons -50 %, magnitude", mlp_dim=768, method="magnitude"),
    Point("neurons -50 %, random", mlp_dim=768, method="random"),
    Point("neurons -50 %, healed", mlp_dim=768, heal_steps=80),
    Point("layers -3, neurons -50 %", drop_layers=3, mlp_dim=768),
    *(
        Point(f"layers -3, neurons -50 %, {steps} steps", drop_layers=3, mlp_dim=768, heal_steps=steps)
        for steps in (320, 1280)
    ),
    Point(
        "layers -3, neurons -50 %, hidden states",
        drop_layers=3,
        mlp_dim=768,
        heal_steps=1280,
        hidden_weight=10.0,
    ),
)


def config() -> SweepConfig:
    cut = dataclasses.replace(prune.config(), drop_layers=0, mlp_dim=0, check_queries=20)
    healing = dataclasses.replace(heal.config(), check_queries=20)
    return SweepConfig(POINTS, prune=cut, heal=healing, num_queries=417)


def quick() -> SweepConfig:
    cut = dataclasses.replace(prune.quick(), drop_layers=0, num_kv_heads=0)
    points = (
        Point("heads", num_kv_heads=2),
        Point("heads, random", num_kv_heads=2, method="random"),
        Point("layer, healed", drop_layers=1, heal_steps=6),
    )
    return SweepConfig(
        points, prune=cut, heal=heal.quick(), num_queries=4, depth=4, timed_queries=1, repeats=2
    )
