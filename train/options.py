"""From a command line to a typed config and a work directory; what every launcher does before its own work.

A config is a Python file: its docstring is the lab note, `config()` returns the experiment and `quick()` the
variant that CI runs, both an instance of the launcher's frozen dataclass. A string literal under a field documents it
in `--help`. `run` parses, prepares JAX's compile cache and the console, and turns `InputError` into one line.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import fcntl
import importlib.util
import inspect
import itertools
import json
import logging
import os
import sys
import tempfile
import textwrap
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.logging
import rich.progress

from jaxsearch.data.assets import cache_dir
from jaxsearch.errors import InputError
from jaxsearch.files import read_object

EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130


def run(
    main: Callable[[Any, Path], None],
    config_type: type,
    *,
    default_config: str | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the command line, then calls `main(config, workdir)` and exits if that fails.

    Args:
        main: the launcher; `workdir` exists when it is called.
        config_type: the frozen dataclass that the config file's functions return.
        default_config: path of the config used where `--config` is not given (None: it must be given).
        argv: arguments without the program's name; None takes them from the process.
    Exit codes: 2 for `InputError` and a wrong command line, 130 after Ctrl-C; SystemExit passes through.
    """
    arguments = _parser(
        config_type, default_config, inspect.getdoc(inspect.getmodule(main)) or ""
    ).parse_args(argv)
    try:
        config = load_config(arguments.config, quick=arguments.quick, config_type=config_type)
        config = override(config, [*arguments.set, *(["skip_bad_lines=true"] * arguments.skip_bad_lines)])
        if arguments.print_config:
            print("\n".join(f"{key}={value}" for key, value in describe(config).items()))
            return
        variant = "-quick" if arguments.quick else ""
        workdir = Path(arguments.workdir or Path("work") / f"{Path(arguments.config).stem}{variant}")
        prepare(workdir)
        with alone(workdir):
            main(config, workdir)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_INPUT_ERROR) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[None]:
    """Holds the folder against other launchers; freed when this process ends, however it does.

    Raises:
        InputError: another process holds it.
    """
    with (workdir / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process works in {workdir}: wait until it is done, or choose another --workdir"
            ) from None
        yield


def prepare(workdir: Path) -> None:
    """Makes `workdir`, keeps compiled programs between runs, and quietens libraries that log at INFO.

    Raises:
        InputError: `workdir` cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir {workdir}: cannot be made ({error.strerror})") from None
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[rich.logging.RichHandler(show_path=False)],
        force=True,
    )
    for name in ("absl", "jax", "orbax", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.WARNING)


FREE_KEYS = (
    "log_every",
    "checkpoint_every",
    "evaluate_every",
    "keep_checkpoints",
    "provider",
    "data",
    "fsdp",
    "tensor",
)
"""Last parts of config keys that may differ when a run goes on: they do not change what it computes."""


def claim(workdir: Path, config: Any, **made_from: str | int) -> None:
    """Notes in `run.json` what a run is made from, and refuses a folder that was begun with something else.

    Args:
        made_from: fingerprints and versions of the inputs, beside the config's own values.
    Raises:
        InputError: the folder's run differs; the keys that do are named.
    """
    values = {
        key: str(value) for key, value in describe(config).items() if key.split(".")[-1] not in FREE_KEYS
    }
    identity = values | {f"{name} (fingerprint)": str(value) for name, value in made_from.items()}
    path = workdir / "run.json"
    if not path.exists():
        write_json(path, identity)
        return
    found = read_object(path, hint="delete it and what was made beside it, or choose another --workdir")
    changed = sorted(key for key in identity | found if found.get(key) != identity.get(key))
    if changed:
        raise InputError(
            f"{workdir} was begun with another {', '.join(changed[:6])}: choose another --workdir, or delete this one"
        )


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
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise InputError(f"--config {path}: defines no {name}()")
    config = getattr(module, name)()
    if type(config).__qualname__ != config_type.__qualname__:
        raise InputError(
            f"--config {path}: is a {type(config).__name__}, this launcher takes {config_type.__name__}"
        )
    return config


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


@contextlib.contextmanager
def progress(
    description: str,
    total: int,
    *,
    done: int = 0,
    console: rich.console.Console | None = None,
    silent_seconds: float = 30.0,
) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, elsewhere a line after `silent_seconds`; yields `advance(count=1, text="")`.

    `text` stands beside the bar (a loss, a speed) until the next one.
    """
    console = console or rich.console.Console(stderr=True)
    if not console.is_terminal:
        yield _line_reporter(description, total, done, console, silent_seconds)
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[text]}"),
    )
    with rich.progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, completed=done, text="")

        def advance(count: int = 1, text: str = "") -> None:
            bar.advance(task, count)
            if text:
                bar.update(task, text=text)

        yield advance


def _line_reporter(
    description: str, total: int, done: int, console: rich.console.Console, silent_seconds: float
) -> Callable[..., None]:
    state = {"done": done, "printed": time.monotonic()}

    def advance(count: int = 1, text: str = "") -> None:
        state["done"] += count
        if time.monotonic() - state["printed"] >= silent_seconds or state["done"] == total:
            state["printed"] = time.monotonic()
            console.print(f"{description} {state['done']}/{total} {text}".rstrip(), highlight=False)

    return advance


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON so that a reader sees the whole old file or the whole new one.

    Raises:
        TypeError: `value` holds what JSON does not know. ValueError: it holds NaN or an infinity.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _parser(config_type: type, default_config: str | None, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=about,
        epilog="fields for --set:\n" + "\n".join(_field_lines(config_type)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="PATH", required=default_config is None, default=default_config)
    parser.add_argument(
        "--workdir", metavar="DIR", help="where everything is written (default: work/<config>)"
    )
    parser.add_argument("--quick", action="store_true", help="the small variant of the config that CI runs")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="extend",
        nargs="+",
        default=[],
        help="override a field of the config",
    )
    parser.add_argument("--skip-bad-lines", action="store_true", help="short for --set skip_bad_lines=true")
    parser.add_argument("--print-config", action="store_true", help="print the config and stop")
    return parser


def _field_lines(config_type: type, prefix: str = "") -> list[str]:
    docs, hints, lines = _field_docs(config_type), typing.get_type_hints(config_type), []
    for field in dataclasses.fields(config_type):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            lines += _field_lines(typing.cast(type, hint), f"{prefix}{field.name}.")
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
        near = difflib.get_close_matches(keys[0], names, n=3, cutoff=0.4) or names
        raise InputError(
            f"--set {full_key}: {type(config).__name__} has no {keys[0]!r}; near it: {', '.join(near)}"
        )
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
