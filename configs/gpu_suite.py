"""Figures of one accelerator: bf16 parity, training, scoring, retrieval, at the published 0.6B shape.

Command: python -m train.gpu_suite --config configs/gpu_suite.py --workdir work/gpu_suite
Time: a few minutes on one data-centre GPU, recipe not counted; quick: a minute on two CPU cores.
Numbers: beside the published ones of the LinkedIn papers, in docs/results once measured; a CPU's say nothing.
"""

from train.gpu_suite import GpuSuiteConfig


def config() -> GpuSuiteConfig:
    return GpuSuiteConfig()


def quick() -> GpuSuiteConfig:
    return GpuSuiteConfig(
        embed_dim=64,
        mlp_dim=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=512,
        repeats=2,
        matmul_size=256,
        train_queries=2,
        train_candidates=2,
        train_item_tokens=16,
        prefix_tokens=8,
        item_tokens=16,
        items=4,
        p95_items=2,
        requests=4,
        max_batch_tokens=64,
        documents=2_000,
        embed_size=32,
        queries=4,
    )
