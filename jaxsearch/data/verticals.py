"""What one field of application changes: views, policy, prompts, threshold; and a document as text.

A vertical is a folder, read by path: `vertical.toml`, `policy.md`, `prompts/judge.txt`, `prompts/ranker.txt`.
No code knows the name of one. How prompts are filled is in `prompts`, where documents come from in `sources`.
"""

import dataclasses
import hashlib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsearch.data.prompts import PromptTemplate
from jaxsearch.data.records import MAX_GRADE, Document, FieldValue
from jaxsearch.errors import InputError

OPTIONAL = ("examples", "lexical_view")
_ENDS = (".", "!", "?", ":", ";")


@dataclasses.dataclass(frozen=True)
class Vertical:
    """One vertical, as its folder states it.

    Attributes:
        name: its name, in reports and model cards.
        directory: the folder it was read from.
        views: for each named view of a document, its fields in the order in which they are read.
        query_instruction: what stands before a query when the encoder embeds it; may be empty.
        relevant_threshold: the least grade, 1..4, that counts as relevant.
        policy: the grading policy, for people and for the judge.
        prompts: templates by name, "judge" and "ranker".
        examples: queries that a search page offers; may be empty.
        lexical_view: the view whose words BM25 searches; empty: the one that is embedded.
    """

    name: str
    directory: Path
    views: Mapping[str, tuple[str, ...]]
    query_instruction: str
    relevant_threshold: int
    policy: str
    prompts: Mapping[str, PromptTemplate]
    examples: tuple[str, ...] = ()
    lexical_view: str = ""

    def words_of(self, view: str) -> str:
        """The view whose words BM25 searches where the encoder reads `view`."""
        return self.lexical_view or view

    def document_text(self, document: Document, view: str) -> str:
        """The text of a document in one of the views.

        Raises:
            InputError: no such view.
        """
        if view not in self.views:
            raise InputError(
                f"vertical {self.name} has no view {view!r}; it has {', '.join(sorted(self.views))}"
            )
        return document_text(document, self.views[view])

    def fingerprint(self) -> str:
        """Twelve hex digits over all that a run which used it depends on: not the name, the place, the examples."""
        parts = {
            "views": {name: list(fields) for name, fields in self.views.items()},
            "query_instruction": self.query_instruction,
            "relevant_threshold": self.relevant_threshold,
            "policy": self.policy,
            "prompts": {name: prompt.fingerprint for name, prompt in self.prompts.items()},
        }
        if self.lexical_view:
            parts["lexical_view"] = self.lexical_view
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def load_vertical(directory: str | os.PathLike[str]) -> Vertical:
    """Reads a vertical's folder.

    Raises:
        InputError: a file is missing or not UTF-8, a key is missing, unknown or of the wrong type, a template
        is wrong;
            with the file's name.
    """
    directory = Path(directory)
    file = directory / "vertical.toml"
    try:
        stated = tomllib.loads(_read(file))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file} is not TOML: {error}") from error
    kinds: dict[str, type] = {"name": str, "query_instruction": str, "relevant_threshold": int, "views": dict}
    problems = []
    if unknown := sorted(stated.keys() - kinds.keys() - set(OPTIONAL)):
        known = ", ".join([*kinds, *OPTIONAL])
        problems.append(f"unknown key {', '.join(map(repr, unknown))} (known: {known})")
    for key, kind in kinds.items():
        if key not in stated:
            problems.append(f"key {key!r} is missing")
        elif not isinstance(stated[key], kind) or isinstance(stated[key], bool):
            problems.append(f"{key} must be a {kind.__name__}, not {stated[key]!r}")
    if not problems:
        problems = _check_values(stated)
    if problems:
        raise InputError(f"{file}: {'; '.join(sorted(problems))}")
    prompts = {}
    for name in ("judge", "ranker"):
        template = directory / "prompts" / f"{name}.txt"
        try:
            prompts[name] = PromptTemplate.from_text(_read(template))
        except InputError as error:
            raise InputError(f"{template}: {error}") from error
    return Vertical(
        name=stated["name"],
        directory=directory,
        views={name: tuple(fields) for name, fields in stated["views"].items()},
        query_instruction=stated["query_instruction"],
        relevant_threshold=stated["relevant_threshold"],
        policy=_read(directory / "policy.md").strip(),
        prompts=prompts,
        examples=tuple(stated.get("examples", ())),
        lexical_view=stated.get("lexical_view", ""),
    )


def document_text(document: Document, fields: Sequence[str]) -> str:
    """The chosen fields of a document as one line of text.

    A list is joined by "; ", numbers have at most two decimals, truth values are True or False, and each
    field ends as a sentence does. Fields that are empty or absent leave nothing behind.

    Example:
        >>> baker = Document("1", {"title": "Baker", "tasks": ["Mix dough.", "Bake."]})
        >>> document_text(baker, ["title", "tasks"])
        'Baker. Mix dough; Bake.'
    """
    parts = []
    for field in fields:
        text = _field_text(document.fields.get(field, ""))
        if text:
            parts.append(text if text.endswith(_ENDS) else f"{text}.")
    return " ".join(parts)


def _field_text(value: FieldValue) -> str:
    if isinstance(value, list):
        items = [" ".join(item.split()).removesuffix(".") for item in value]
        return "; ".join(item for item in items if item)
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return " ".join(str(value).split())


def _check_values(stated: Mapping[str, Any]) -> list[str]:
    problems = []
    if not 1 <= stated["relevant_threshold"] <= MAX_GRADE:
        problems.append(f"relevant_threshold must be 1..{MAX_GRADE}, not {stated['relevant_threshold']}")
    examples = stated.get("examples", [])
    if not (isinstance(examples, list) and all(isinstance(text, str) and text.strip() for text in examples)):
        problems.append(f"examples must be a list of queries, not {examples!r}")
    if stated.get("lexical_view", "") not in ("", *stated["views"]):
        problems.append(f"lexical_view must be one of the views, not {stated['lexical_view']!r}")
    if not stated["views"]:
        problems.append("views must name one view at least")
    for name, fields in stated["views"].items():
        if not (isinstance(fields, list) and fields and all(isinstance(field, str) for field in fields)):
            problems.append(f"view {name!r} must be a list of field names, not {fields!r}")
    return problems


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(
            f"{file} is missing: a vertical is a folder with vertical.toml, policy.md, prompts/judge.txt and "
            "prompts/ranker.txt"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
