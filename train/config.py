"""Typed configs: a Python file, overrides from the command line, and what `--help` and `--print-config` say of them.

A config is a Python file: its docstring is the lab note, `config()` returns the experiment and `quick()` the
variant that CI runs, both an instance of the launcher's frozen dataclass. A string literal under a field documents it,
`Annotated` with a `Bound` limits it (`Count`, `Rate`, `Share`).
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import itertools
import math
import textwrap
import traceback
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from jaxsearch.errors import InputError


@dataclasses.dataclass(frozen=True)
class Bound:
    """Limits of a field: from `least` on, or above it, to `most`; NaN and infinities never pass."""

    least: float
    most: float = math.inf
    is_above: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.least if self.is_above else value >= self.least
        return above and value <= self.most and math.isfinite(value)

    def __str__(self) -> str:
        text = f"above {self.least:g}" if self.is_above else f"at least {self.least:g}"
        return text if self.most == math.inf else f"{text} and at most {self.most:g}"


Count = Annotated[int, Bound(1)]
CountOrNone = Annotated[int, Bound(0)]
"""A number of things of which there may be none; what 0 means is said at the field."""
Rate = Annotated[float, Bound(0, is_above=True)]
Share = Annotated[float, Bound(0, 1)]


def load_config(path: str | Path, *, quick: bool, config_type: type) -> Any:
    """What `config()`, or `quick()`, of the Python file at `path` returns.

    Raises:
        InputError: no such file, no such function in it, or another type than `config_type`.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.py") if other.stem != "__init__")
        hint = f"; beside it there are {', '.join(near)}" if near else ""
        raise InputError(f"--config {path}: no such file{hint}")
    name = "quick" if quick else "config"
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"--config {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, name):
            raise InputError(f"--config {path}: defines no {name}()")
        config = getattr(module, name)()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"--config {path}{_line_of(error, path)}: {type(error).__name__}: {error}"
        ) from error
    if type(config).__qualname__ != config_type.__qualname__:
        raise InputError(
            f"--config {path}: is a {type(config).__name__}, this launcher takes {config_type.__name__}"
        )
    return config


def check(config: Any, prefix: str = "") -> None:
    """Whether every field holds a value of its type within its bound.

    Raises:
        InputError: all that do not, each with what it takes.
    """
    if wrong := _problems(config, prefix):
        raise InputError("; ".join(wrong))


def _problems(config: Any, prefix: str) -> list[str]:
    wrong = []
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value, full = getattr(config, name), prefix + name
        if dataclasses.is_dataclass(value):
            wrong += _problems(value, f"{full}.")
            continue
        bounds = [extra for extra in typing.get_args(hint)[1:] if isinstance(extra, Bound)]
        plain = typing.get_args(hint)[0] if bounds else hint
        if not _fits(value, plain):
            wrong.append(f"{full}: {value!r} is not a value of type {_type_name(plain)}")
        elif bounds and value not in bounds[0]:
            wrong.append(f"{full} must be {bounds[0]}, not {value!r}")
    return wrong


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the annotated type; whole numbers are floats too."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        if not isinstance(value, tuple) or (inner[-1] is not Ellipsis and len(value) != len(inner)):
            return False
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return all(_fits(part, kind) for part, kind in zip(value, kinds, strict=True))
    if isinstance(value, bool):
        return hint in (bool, Any)
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or hint) if isinstance(origin or hint, type) else True


def _line_of(error: Exception, path: Path) -> str:
    """A colon and the line, where the config file is the reason."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}" if error.filename == str(path) else ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f":{frames[-1].lineno}" if frames else ""


def override(config: Any, assignments: Sequence[str]) -> Any:
    """A copy of a dataclass with `key=value` assignments, keys dotted into nested dataclasses.

    Values are read by the field's annotation: numbers, strings, booleans (true/false), paths, `none` where None
    is allowed, tuples as `a,b,c`, literals.

    Raises:
        InputError: no such key (the nearest ones are named), or a value that its type does not take.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment}: write key=value")
        config = _assign(config, key.strip().split("."), text, key.strip())
    return config


def describe(config: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of a dataclass and those nested in it; what `--print-config` prints."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= describe(value, f"{prefix}{field.name}.")
        else:
            values[prefix + field.name] = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return values


def field_lines(config_type: type, prefix: str = "") -> list[str]:
    docs, hints, lines = _field_docs(config_type), typing.get_type_hints(config_type), []
    for field in dataclasses.fields(config_type):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            lines += field_lines(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        default = "" if field.default is dataclasses.MISSING else f" = {field.default}"
        lines.append(f"  {prefix}{field.name}: {_type_name(hint)}{default}")
        lines += textwrap.wrap(
            docs.get(field.name, ""), 96, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return lines


def _field_docs(config_type: type) -> dict[str, str]:
    """The string literals that stand under the fields of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_type))).body[0]
    statements = body.body if isinstance(body, ast.ClassDef) else []
    docs = {}
    for statement, after in itertools.pairwise(statements):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(after.value.value).split())
    return docs


def _assign(config: Any, keys: list[str], text: str, full_key: str) -> Any:
    names = [field.name for field in dataclasses.fields(config)]
    if keys[0] not in names:
        near = difflib.get_close_matches(keys[0], names, n=3, cutoff=0.4)
        hint = f"near it: {', '.join(near)}" if near else f"it has {', '.join(names)}"
        raise InputError(f"--set {full_key}: {type(config).__name__} has no {keys[0]!r}; {hint}")
    value = getattr(config, keys[0])
    if dataclasses.is_dataclass(value):
        if len(keys) == 1:
            raise InputError(
                f"--set {full_key}: holds several fields: {', '.join(describe(value, full_key + '.'))}"
            )
        return dataclasses.replace(config, **{keys[0]: _assign(value, keys[1:], text, full_key)})
    if len(keys) > 1:
        raise InputError(f"--set {full_key}: {keys[0]!r} holds one value, not fields")
    hint = typing.get_type_hints(type(config))[keys[0]]
    try:
        return dataclasses.replace(config, **{keys[0]: _parse(text.strip(), hint)})
    except InputError as error:  # what the dataclass itself says of its values
        raise InputError(f"--set {full_key}={text}: {error}") from None
    except (ValueError, TypeError, KeyError):
        raise InputError(f"--set {full_key}={text}: not a value of type {_type_name(hint)}") from None


def _parse(text: str, hint: Any) -> Any:
    """`text` as a value of the annotated type; ValueError where it is none."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if types.NoneType in inner and text.lower() == "none":
            return None
        return _parse_first(text, [option for option in inner if option is not types.NoneType])
    if origin is typing.Literal:
        return _parse_first(text, [type(option) for option in inner], among=inner)
    if origin is tuple:
        parts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
        kinds = [inner[0]] * len(parts) if inner[-1] is Ellipsis else list(inner)
        return tuple(_parse(part, kind) for part, kind in zip(parts, kinds, strict=True))
    if hint is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if hint is int:
        return int(text.replace("_", ""))
    if hint in (float, str, Path):
        return hint(text)
    raise ValueError(f"no way to read a {hint} from text")


def _parse_first(text: str, hints: Sequence[Any], among: Sequence[Any] | None = None) -> Any:
    for hint in hints:
        with contextlib.suppress(ValueError, KeyError):
            value = _parse(text, hint)
            if among is None or value in among:
                return value
    raise ValueError(text)


def _type_name(hint: Any) -> str:
    return (
        hint.__name__
        if isinstance(hint, type) and not typing.get_args(hint)
        else str(hint).replace("typing.", "")
    )
