"""What docs/elsewhere.md tells people to run gives the score that the library gives."""

import re
from pathlib import Path

from jaxsearch.ranker import load_ranker
from jaxsearch.scoring.prefill import ScoreRequest
from tests.tiny_bundle import write_parts
from train.inputs import offline_scorer

PAGE = Path(__file__).parents[2] / "docs" / "elsewhere.md"


def test_the_ranker_scored_in_transformers_as_the_page_says(tmp_path, capsys):
    folder = write_parts(tmp_path)["ranker"]
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    source = re.sub(r'^folder = ".*"$', f"folder = {str(folder)!r}", code[1], flags=re.MULTILINE)
    exec(source, {})
    printed = float(capsys.readouterr().out.split()[-1])
    ranker = load_ranker(folder)
    prompt = ranker.request("bake bread", ["Bakers. Mix and bake ingredients."])
    logits = offline_scorer(ranker).score([ScoreRequest(prompt.prefix, prompt.items)])[0]
    assert abs(printed - float(ranker.scores(logits)[0])) < 1e-5  # measured: 2e-6 with the demo's ranker
