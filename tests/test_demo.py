"""The pipeline's stages: run once, skipped afterwards, refused when what they were made from has changed."""

import io

import pytest
import rich.console

from jaxsearch.errors import InputError
from tests.tiny_bundle import write_parts
from tests.tiny_collection import write_collection
from train.demo import PipelineConfig, Stage, run_stage

CONFIG = '''"""BM25 over a tiny collection."""
from train.index import IndexConfig

def config():
    return IndexConfig(kind="bm25", view="full")
'''


@pytest.fixture
def stage(tmp_path) -> Stage:
    (tmp_path / "index.py").write_text(CONFIG)
    inputs = {
        "collection": str(write_collection(tmp_path / "data")),
        "vertical": str(write_parts(tmp_path / "parts")["vertical"]),
    }
    return Stage("index", "train.index", str(tmp_path / "index.py"), "words", "index", inputs)


def start(stage: Stage, workdir, before: str = "") -> tuple[tuple[str, float], str]:
    """What `run_stage` returns and prints."""
    console = rich.console.Console(file=io.StringIO(), width=200)
    workdir.mkdir(exist_ok=True)
    done = run_stage(stage, PipelineConfig("tiny", (stage,)), workdir, before, console)
    return done, console.file.getvalue()


def test_a_finished_stage_is_skipped_until_its_inputs_change(stage, tmp_path):
    workdir = tmp_path / "work"
    (identity, seconds), said = start(stage, workdir)
    assert seconds > 0
    assert "index · words" in said
    assert (workdir / "index" / "index" / "index.json").is_file()
    (again, seconds), said = start(stage, workdir)
    assert (again, seconds) == (identity, 0.0)
    assert "done before" in said
    with pytest.raises(InputError, match=r"stage index in .* was done with another config: delete"):
        start(stage, workdir, before="another stage")
    policy = tmp_path / "parts" / "vertical" / "policy.md"
    policy.write_text("Grade 0 always.\n")
    with pytest.raises(InputError, match="was done with another config"):
        start(stage, workdir)


def test_a_stage_that_fails_or_leaves_nothing_stops_the_pipeline(stage, tmp_path):
    absent = Stage("index", stage.launcher, stage.config, "words", "nothing", stage.inputs)
    with pytest.raises(InputError, match="was stopped before it was finished"):
        start(absent, tmp_path / "work")
    assert not (tmp_path / "work" / "index" / "stage.json").exists()
    wrong = Stage("index", stage.launcher, stage.config, "words", "index", stage.inputs | {"view": "long"})
    with pytest.raises(InputError, match=r"failed \(exit 2\)"):
        start(wrong, tmp_path / "other")
