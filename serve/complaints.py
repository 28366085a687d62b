"""Pydantic's complaints about a body in words that its sender knows: fields and JSON, one line."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Problem = Mapping[str, Any]
"""One entry of `ValidationError.errors()`."""
MAX_TOLD = 3
"""So many places or complaints are told; of the rest, how many they are."""
WANTED = {
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
}
"""What a field must be where pydantic names its own type of error."""


def complaints(problems: Iterable[Problem]) -> tuple[str, str | None]:
    """One line, each complaint with the places that it is about, of many only the first few; and the first place."""
    told: dict[str, list[str]] = {}
    for place, found in _by_place(problems).items():
        told.setdefault(_complaint(found), []).append(place)
    parts = [f"{_first(places, ', ') or 'body'}: {complaint}" for complaint, places in told.items()]
    return _first(parts, "; "), next(iter(told.values()))[0] or None


def _first(parts: Sequence[str], separator: str) -> str:
    shown = separator.join(parts[:MAX_TOLD])
    return shown if len(parts) <= MAX_TOLD else f"{shown} and {len(parts) - MAX_TOLD} more"


def _by_place(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    """Per place what is wrong there. Of a union's types only those count that the value is nearest to."""
    unions: dict[tuple, dict[str, list[Problem]]] = {}
    for problem in problems:
        place = problem["loc"]
        at = next((number for number, part in enumerate(place) if _is_union_branch(part)), len(place))
        branch = place[at] if at < len(place) else ""
        unions.setdefault(place[:at], {}).setdefault(branch, []).append(problem)
    found: dict[str, list[Problem]] = {}
    for branches in unions.values():
        # a value of the right type is wrong further inside; then the fewer complaints the nearer
        distances = {
            branch: (-max(len(problem["loc"]) for problem in inside), len(inside))
            for branch, inside in branches.items()
        }
        least = min(distances.values())
        for branch, inside in branches.items():
            for problem in inside if distances[branch] == least else ():
                place = ".".join(str(part) for part in problem["loc"] if not _is_union_branch(part))
                found.setdefault(place, []).append(problem)
    return found


def _complaint(problems: Iterable[Problem]) -> str:
    """What the places of one complaint must be; pydantic's own words where those are plain."""
    wanted = {WANTED[problem["type"]]: None for problem in problems if problem["type"] in WANTED}
    if wanted:
        return f"must be {' or '.join(wanted)}"
    message = next(iter(problems))["msg"].replace("Input should be", "must be")
    return message[:1].lower() + message[1:].replace("be True", "be true")


def _is_union_branch(part: str | int) -> bool:
    """Pydantic puts the name of the tried type into the place; clients only know their fields."""
    return isinstance(part, str) and (part in ("str", "constrained-str", "DocumentObject") or "[" in part)
