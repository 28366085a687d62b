"""Filters and facets over the fields of the corpus, column by column.

A filter is `{"and": [...]}`, `{"or": [...]}`, `{"not": ...}` or `{"field": name, op: value}` with one of the operators
`eq ne in lt lte gt gte exists`; it becomes one boolean per document, which the indexes take as `filter_where`.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxsearch.data.records import Document
from jaxsearch.errors import InputError

OPERATORS = ("eq", "ne", "in", "lt", "lte", "gt", "gte", "exists")
MAX_NODES = 1000
MAX_NESTING = 32
MAX_FACET_VALUES = 200


class Column:
    """One field of all documents: a text, list, number or truth value per document, or nothing."""

    def __init__(self, name: str, values: Sequence[Any]) -> None:
        self.name = name
        self.exists = np.array([value is not None for value in values])
        kinds = {_kind(value) for value in values if value is not None}
        self.kind = kinds.pop() if len(kinds) == 1 else "mixed"
        self._values = values
        if self.kind == "number":
            self._numbers = np.array([np.nan if v is None else v for v in values], np.float64)
        else:
            rows: dict[Any, list[int]] = collections.defaultdict(list)
            for row, value in enumerate(values):
                for part in value if isinstance(value, list) else [value]:
                    if part is not None:
                        rows[_key(part)].append(row)
            self._rows = rows

    def described(self) -> dict[str, Any]:
        """A facet is a field with few values for many documents; numbers have a range instead."""
        about: dict[str, Any] = {"name": self.name, "kind": self.kind, "is_facet": False}
        if self.kind == "number":
            return about | {"least": float(np.nanmin(self._numbers)), "most": float(np.nanmax(self._numbers))}
        most = min(MAX_FACET_VALUES, int(self.exists.sum()) // 2)
        return about | {"is_facet": 1 < len(self._rows) <= most}

    def equal_to(self, value: Any) -> Bool[np.ndarray, "c"]:
        """Documents whose value is `value`; a list field counts when one of its entries is."""
        if self.kind == "number":
            return self._numbers == value
        found = np.zeros(len(self.exists), np.bool_)
        found[self._rows.get(_key(value), [])] = True
        return found

    def compare(self, operator: str, value: Any) -> Bool[np.ndarray, "c"]:
        """Numbers by size, texts by code point; documents without the field never pass."""
        if self.kind == "number":
            left = self._numbers
        else:
            left = np.array([v if isinstance(v, str) else "" for v in self._values])
        compared = {"lt": np.less, "lte": np.less_equal, "gt": np.greater, "gte": np.greater_equal}[operator]
        return compared(left, value) & self.exists

    def counts(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Values among `rows` with how many documents have them, most frequent first."""
        counter: collections.Counter = collections.Counter()
        for row in rows:
            value = self._values[row]
            if value is not None:
                counter.update(set(value) if isinstance(value, list) else [value])
        ordered = sorted(counter.items(), key=lambda pair: (-pair[1], str(pair[0])))
        return [{"value": value, "count": count} for value, count in ordered]


class Columns:
    """The fields of a corpus."""

    def __init__(self, documents: Sequence[Document]) -> None:
        names = {name: None for document in documents for name in document.fields}
        self.size = len(documents)
        self._columns = {
            name: Column(name, [document.fields.get(name) for document in documents]) for name in names
        }
        self.described = [self._columns[name].described() for name in self.names]
        """Per field its name, its kind, and what a page needs to offer it as a filter."""

    @property
    def names(self) -> list[str]:
        return sorted(self._columns)

    def column(self, name: Any, *, where: str) -> Column:
        """The column of a field. Raises: InputError that names the known fields."""
        if not isinstance(name, str) or name not in self._columns:
            raise InputError(f"unknown field {name!r} in {where}; known fields: {', '.join(self.names)}")
        return self._columns[name]

    def where(self, node: Mapping[str, Any]) -> Bool[np.ndarray, "c"]:
        """True for documents that pass the filter.

        Raises: InputError for an unknown field, operator or wrong type, saying what is known; or a filter of more than
        `MAX_NODES` conditions or `MAX_NESTING` levels.
        """
        budget = [MAX_NODES]
        return self._where(node, budget, MAX_NESTING)

    def _where(self, node: Any, budget: list[int], levels: int) -> Bool[np.ndarray, "c"]:
        budget[0] -= 1
        if budget[0] < 0 or levels < 0:
            raise InputError(
                f"the filter is too large: at most {MAX_NODES} conditions, nested at most {MAX_NESTING} deep"
            )
        if not isinstance(node, Mapping):
            raise InputError(f"a filter must be an object, not {_told(node)}")
        if node.keys() & {"and", "or"}:
            return self._combined(node, budget, levels)
        if "not" in node:
            if len(node) != 1:
                raise InputError(f"a filter with 'not' has no other key; got {sorted(node)}")
            return ~self._where(node["not"], budget, levels - 1)
        return self._condition(node)

    def _combined(self, node: Mapping[str, Any], budget: list[int], levels: int) -> Bool[np.ndarray, "c"]:
        if len(node) != 1:
            raise InputError(f"a filter has one of 'and', 'or', 'not' and no other key; got {sorted(node)}")
        (name, parts), *_ = node.items()
        if not isinstance(parts, list) or not parts:
            raise InputError(f"{name!r} in a filter needs a list of at least one filter, not {_told(parts)}")
        combine = np.logical_and if name == "and" else np.logical_or
        return combine.reduce([self._where(part, budget, levels - 1) for part in parts])

    def _condition(self, node: Mapping[str, Any]) -> Bool[np.ndarray, "c"]:
        if "field" not in node:
            raise InputError(f"a filter needs 'field', 'and', 'or' or 'not'; got {sorted(map(str, node))}")
        column = self.column(node["field"], where="filter")
        operators = [key for key in node if key != "field"]
        if len(operators) != 1 or operators[0] not in OPERATORS:
            raise InputError(
                f"a condition on {column.name!r} needs exactly one of {', '.join(OPERATORS)}; got {operators}"
            )
        operator, value = operators[0], node[operators[0]]
        if operator == "exists":
            if not isinstance(value, bool):
                raise InputError(f"'exists' on {column.name!r} needs true or false, not {_told(value)}")
            return column.exists == value
        if operator == "in":
            if not isinstance(value, list):
                raise InputError(f"'in' on {column.name!r} needs a list, not {_told(value)}")
            parts = [column.equal_to(self._checked(column, entry)) for entry in value]
            return np.logical_or.reduce([np.zeros(self.size, np.bool_), *parts])
        value = self._checked(column, value)
        if operator in ("eq", "ne"):
            return column.equal_to(value) == (operator == "eq")
        if column.kind not in ("number", "text"):
            raise InputError(f"{operator!r} needs a number or text field, {column.name!r} is {column.kind}")
        return column.compare(operator, value)

    def _checked(self, column: Column, value: Any) -> Any:
        wanted = {"list": "text"}.get(column.kind, column.kind)
        if wanted not in ("mixed", _kind(value)) or _kind(value) not in ("text", "number", "truth value"):
            fields = ", ".join(f"{name} ({self._columns[name].kind})" for name in self.names)
            raise InputError(
                f"field {column.name!r} in filter needs a {wanted}, not {_told(value)}; known fields: {fields}"
            )
        return value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "truth value"
    kinds = {str: "text", int: "number", float: "number", list: "list"}
    return kinds.get(type(value), type(value).__name__)


def _key(value: Any) -> tuple[str, Any]:
    """Keeps 1, True and "1" apart."""
    return _kind(value), value


def _told(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
