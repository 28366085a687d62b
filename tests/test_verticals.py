"""Verticals as folders, and documents as text."""

import shutil
from pathlib import Path

import pytest

from jaxsearch.data.records import Document
from jaxsearch.data.verticals import document_text, load_vertical
from jaxsearch.errors import InputError

SHIPPED = sorted(
    path.parent for path in (Path(__file__).parents[1] / "configs/verticals").glob("*/vertical.toml")
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED[0], tmp_path / "vertical"))


@pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: path.name)
def test_every_vertical_that_ships_loads(directory: Path):
    vertical = load_vertical(directory)
    assert vertical.name == directory.name
    assert vertical.directory == directory
    assert set(vertical.prompts) == {"judge", "ranker"}
    assert {"short", "full"} <= set(vertical.views)
    assert all(f"{grade}:" in vertical.policy for grade in range(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('name = "x"', "key 'query_instruction' is missing; key 'relevant_threshold' is missing"),
        ("= 2\n", "not TOML"),
        (
            'name = 3\nquery_instruction = ""\nrelevant_threshold = 2\n[views]\na = ["b"]',
            "name must be a str",
        ),
        (
            'name = "x"\nquery_instruction = ""\nrelevant_threshold = 5\n[views]\na = ["b"]',
            "must be 1..4, not 5",
        ),
        (
            'name = "x"\nquery_instruction = ""\nrelevant_threshold = true\n[views]\na = ["b"]',
            "must be a int",
        ),
        (
            'name = "x"\nquery_instruction = ""\nrelevant_threshold = 2\n[views]\na = "b"',
            "view 'a' must be a list",
        ),
        ('name = "x"\nquery_instruction = ""\nrelevant_threshold = 2\n[views]', "one view at least"),
        (
            'name = "x"\nlexical_view = "b"\nquery_instruction = ""\nrelevant_threshold = 2\n[views]\na = ["c"]',
            "lexical_view must be one of the views, not 'b'",
        ),
        (
            'name = "x"\ntop = 1\nquery_instruction = ""\nrelevant_threshold = 2\n[views]\na = ["b"]',
            r"unknown key 'top' \(known: name, query_instruction, relevant_threshold, views, examples, lexical_view\)",
        ),
    ],
)
def test_a_wrong_toml_is_refused_with_its_name(folder: Path, change: str, message: str):
    (folder / "vertical.toml").write_text(change)
    with pytest.raises(InputError, match=message) as caught:
        load_vertical(folder)
    assert str(folder / "vertical.toml") in str(caught.value)


@pytest.mark.parametrize("missing", ["vertical.toml", "policy.md", "prompts/judge.txt", "prompts/ranker.txt"])
def test_a_missing_file_is_named(folder: Path, missing: str):
    (folder / missing).unlink()
    with pytest.raises(InputError, match=rf"{missing} is missing"):
        load_vertical(folder)


def test_a_wrong_template_or_encoding_is_refused_with_its_name(folder: Path):
    (folder / "prompts/judge.txt").write_text("no separator")
    with pytest.raises(InputError, match=r"judge\.txt: a prompt template needs one line"):
        load_vertical(folder)
    (folder / "prompts/judge.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"cannot read .*judge\.txt"):
        load_vertical(folder)


def test_text_of_every_kind_of_field():
    fields = {
        "title": "Tour guide!",
        "skills": ["plan tours.", " ", "speak\nwell"],
        "salary": 3.14159,
        "rating": 4.0,
        "openings": 12,
        "remote": True,
        "empty": "  ",
        "none": [],
    }
    text = document_text(Document("7", fields), list(fields))
    assert text == "Tour guide! plan tours; speak well. 3.14. 4. 12. True."
    assert document_text(Document("7", fields), ["empty"]) == ""
    assert document_text(Document("7", fields), ["city", "openings"]) == "12."


def test_a_view_is_its_fields():
    vertical = load_vertical(SHIPPED[0])
    document = Document("1", {field: field for fields in vertical.views.values() for field in fields})
    for view, fields in vertical.views.items():
        assert vertical.document_text(document, view) == document_text(document, fields)
    with pytest.raises(InputError, match="has no view 'long'; it has full, short"):
        vertical.document_text(document, "long")
