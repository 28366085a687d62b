"""The real recipe on O*NET activity search, short view, with a second ranker on the judge's labels alone.

Command: python -m train.demo --config configs/reference/pipeline.py --workdir work/reference
Time: 95 minutes on two cores of 95 GFLOP/s each, the stages summed, resumable.
Numbers: docs/results/reference, of the encoder as first stage; not run again since it is hybrid.
"""

import dataclasses

from configs.demo import pipeline
from train.demo import PipelineConfig, Stage

OTHER = "judge-labels-only={workdir}/ranker_judge/model"


def stages() -> tuple[Stage, ...]:
    """The demo's path, a ranker without gold before the table."""
    path = []
    for stage in pipeline.stages("reference"):
        ranker = next((done for done in path if done.name == "ranker"), stage)
        if stage.name == "evaluate":
            path.append(
                Stage(
                    "ranker_judge",
                    "train.ranker",
                    "configs/reference/ranker_judge.py",
                    "the same ranker on the judge's labels alone",
                    "model",
                    ranker.inputs,
                )
            )
            stage = dataclasses.replace(stage, inputs=stage.inputs | {"other_rankers": OTHER})
        path.append(stage)
    return tuple(path)


def config() -> PipelineConfig:
    return PipelineConfig(
        title="jaxsearch reference: the real recipe",
        stages=stages(),
        closing="Grades are derived from O*NET's task links, not given by people; the view is the short one.",
    )


def quick() -> PipelineConfig:
    return dataclasses.replace(config(), is_quick=True)
