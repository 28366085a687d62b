"""Fits the sizes of launches to the requests that a server really gets: least padding for a number of programs.

    python -m serve.main --bundle BUNDLE --record-lengths lengths.jsonl
    python -m serve.plan --bundle BUNDLE --lengths lengths.jsonl --out lattice.json
    python -m serve.main --bundle BUNDLE --lattice lattice.json

A recorded line says how many tokens a request's prefix and each of its items had, and no text. Every request is packed
alone, as in a server that is not busy; under load launches are full, and pad little with any sizes.
"""

import argparse
import contextlib
import json
import logging
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import rich.console
import rich.table

from jaxsearch.buckets import LAUNCH_MULTIPLE, Buckets, Lattice
from jaxsearch.bundle import read_lattice
from jaxsearch.errors import InputError
from jaxsearch.files import read_object, write_json
from jaxsearch.scoring.packing import ScoreRequest, Shapes, fill_launches

NUM_PROGRAMS = 10
RECORD = "record it with --record-lengths of serve.main"
log = logging.getLogger("jaxsearch.serve")


class Lengths(NamedTuple):
    """Tokens of one request."""

    prefix: int
    items: tuple[int, ...]


class LengthLog:
    """Appends the lengths of requests to a file, a line each, until that fails; missing folders are made.

    Raises: InputError when the file cannot be written to at first.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise InputError(f"cannot write {path} ({error.strerror}); choose another file") from None
        self._lock = threading.Lock()
        self._is_broken = False

    def add(self, request: ScoreRequest) -> None:
        line = {"prefix": len(request.prefix), "items": [len(item) for item in request.items]}
        with self._lock:
            if not self._is_broken:
                try:
                    self._file.write(json.dumps(line) + "\n")
                except (OSError, ValueError) as error:  # a full disk must not stop the server
                    self._is_broken = True
                    log.warning("%s: no more lengths are recorded (%s)", self._file.name, error)

    def close(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # what could not be written is tried once more
            self._file.close()


def read_lengths(path: str | Path) -> list[Lengths]:
    """What `LengthLog` wrote.

    Raises: InputError that lists the bad lines, or when there is none at all.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); {RECORD}") from None
    except UnicodeDecodeError:
        raise InputError(f"cannot read {path} (not UTF-8); {RECORD}") from None
    found, wrong = [], []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            lengths = Lengths(value["prefix"], tuple(value["items"]))
            if not lengths.items or not all(
                type(size) is int and size > 0 for size in (lengths.prefix, *lengths.items)
            ):
                raise ValueError
            found.append(lengths)
        except (ValueError, KeyError, TypeError):
            wrong.append(str(number))
    if wrong or not found:
        what = f"these lines are not lengths: {', '.join(wrong[:10])}" if wrong else "it is empty"
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise InputError(f"{path}: {what}{more}; {RECORD}")
    return found


def launch_fills(requests: Iterable[Lengths], lattice: Lattice) -> list[int]:
    """The tokens of every launch if each request runs alone, rounded up to whole blocks at most.

    Raises: InputError for a request that the lattice has no place for.
    """
    shapes = Shapes(lattice)
    fills = []
    for lengths in requests:
        if lengths.prefix > lattice.max_prefix_tokens or max(lengths.items) > lattice.max_item_tokens:
            raise InputError(
                f"a request has {lengths.prefix} + {max(lengths.items)} tokens, the bundle takes "
                f"{lattice.max_prefix_tokens} + {lattice.max_item_tokens}: it was recorded with another one"
            )
        request = ScoreRequest((0,) * lengths.prefix, [(0,) * size for size in lengths.items])
        fills += [launch.filled for launch in fill_launches(shapes, [request])]
    return fills


def fit(fills: Sequence[int], lattice: Lattice, *, num_programs: int) -> Lattice:
    """At most so many sizes with the least padding over `fills`, the largest launch always among them."""
    sizes = Buckets.fit(fills, count=num_programs, largest=lattice.max_batch_tokens, multiple=LAUNCH_MULTIPLE)
    return Lattice(sizes, lattice.max_prefix_tokens, lattice.max_item_tokens)


def padding(fills: Sequence[int], lattice: Lattice) -> float:
    """Share of padded tokens that hold nothing.

    >>> padding([100, 200], Lattice(Buckets([128, 256]), 8, 8))
    0.21875
    """
    return 1 - sum(fills) / sum(lattice.launches.bucket_of(fill) for fill in fills)


def load_lattice(path: str | Path, lattice: Lattice) -> Lattice:
    """A planned lattice for a bundle with `lattice`. Raises: InputError when it is none, or takes other prompts."""
    value = read_object(path, hint="make one with python -m serve.plan")
    try:
        planned = Lattice.from_json(value)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    for name in ("max_prefix_tokens", "max_item_tokens"):
        if getattr(planned, name) != getattr(lattice, name):
            raise InputError(
                f"{path} has {name} {getattr(planned, name)}, the bundle {getattr(lattice, name)}: plan it again "
                "for this bundle"
            )
    return planned


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve.plan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bundle", required=True, help="directory written by train.export")
    parser.add_argument("--lengths", required=True, help="file that serve.main --record-lengths wrote")
    parser.add_argument("--out", default="lattice.json", help="what is written (default %(default)s)")
    parser.add_argument(
        "--programs",
        type=int,
        default=NUM_PROGRAMS,
        help="sizes at most; each is compiled (default %(default)s)",
    )
    return parser


def main() -> None:
    options = _parser().parse_args()
    try:
        if options.programs < 1:
            raise InputError(f"--programs is {options.programs}; at least one is needed")
        lattice = read_lattice(options.bundle)
        requests = read_lengths(options.lengths)
        fills = launch_fills(requests, lattice)
        planned = fit(fills, lattice, num_programs=options.programs)
        try:
            write_json(options.out, planned.to_json())
        except OSError as error:
            raise InputError(f"cannot write {options.out} ({error.strerror}); choose another --out") from None
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    table = rich.table.Table("lattice", "sizes", "padding", title=f"{len(requests)} requests, each alone")
    for name, each in (("the bundle's", lattice), (options.out, planned)):
        sizes = ", ".join(map(str, each.launches.sizes))
        table.add_row(name, sizes, f"{padding(fills, each):.1%}")
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
