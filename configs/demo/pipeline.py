"""The whole path on O*NET activity search, short view: from pinned downloads to a served, ranked search.

Command: python -m train.demo --config configs/demo/pipeline.py --workdir work/demo
Time: about half an hour on two cores of 95 GFLOP/s each; not timed in one go since the table ranks 20 documents of
      every test query.
Numbers: the table of the evaluate stage; see `closing` for what they can and cannot show.
"""

from train.demo import PipelineConfig, Stage

CLOSING = (
    "Grades are derived from O*NET's task links, not given by people. This budget (320 judge pairs, 2,560 ranker "
    "pairs) shows that every part works and what fine-tuning the encoder buys; a ranker needs more, and this "
    "collection has little room for one: the bundle serves it only where it helps."
)


def stages(folder: str) -> tuple[Stage, ...]:
    """The path with the stage configs of `configs/<folder>`."""
    models = {name: f"{{workdir}}/{name}/model" for name in ("encoder", "judge", "ranker")}
    where = f"configs/{folder}"
    return (
        Stage(
            "judge",
            "train.judge",
            f"{where}/judge.py",
            "LoRA on SmolLM2-135M grades pairs 0-4 under a policy",
            "model",
        ),
        Stage(
            "label",
            "train.label",
            f"{where}/label.py",
            "the judge labels pairs for distillation",
            inputs={"judge": models["judge"]},
        ),
        Stage("encoder", "train.encoder", f"{where}/encoder.py", "MiniLM learns to retrieve", "model"),
        Stage(
            "index",
            "train.index",
            f"{where}/index.py",
            "every document embedded",
            inputs={"encoder": models["encoder"]},
        ),
        Stage(
            "ranker",
            "train.ranker",
            f"{where}/ranker.py",
            "a cut SmolLM2 learns to rank from judge and grades",
            "model",
            {"labels": "{workdir}/label", "retriever": models["encoder"]},
        ),
        Stage(
            "export",
            "train.export",
            f"{where}/export.py",
            "everything that serving needs in one folder, and which order is served",
            inputs={
                "encoder": models["encoder"],
                "ranker": models["ranker"],
                "index": "{workdir}/index/index",
            },
        ),
        Stage(
            "evaluate",
            "train.evaluate",
            f"{where}/evaluate.py",
            "how good what is served is, and every part of it",
            inputs={"bundle": "{workdir}/export/bundle", "judge": models["judge"]},
        ),
    )


def config() -> PipelineConfig:
    return PipelineConfig(
        title="jaxsearch demo: LLM-ranked search over occupations",
        stages=stages("demo"),
        closing=CLOSING,
        advice="make reference   # the real recipe",
    )


def quick() -> PipelineConfig:
    return PipelineConfig(
        title="jaxsearch demo, quick: every part once, too small to learn from",
        stages=stages("demo"),
        is_quick=True,
        closing="Every part ran once; a few steps of training teach nothing, so the numbers mean nothing.",
        advice="make demo   # the size that learns something",
    )
