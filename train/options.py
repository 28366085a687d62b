"""From a command line to a typed config and a work directory; what every launcher does before its own work.

`run` parses, prepares JAX's compile cache and the console, and turns `InputError` into one line. Configs are read in
`config`, the folder is held in `workdir`.
"""

import argparse
import contextlib
import inspect
import logging
import sys
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
from train.config import check, describe, field_lines, load_config, override
from train.processes import is_main, join, supervise
from train.workdir import alone

EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130
FLAGS = {"skip_bad_lines": "--skip-bad-lines", "allow_worse": "--allow-worse"}
"""Fields that, where a config has them, are switched on by a flag of their own."""


def run(
    main: Callable[[Any, Path], None],
    config_type: type,
    *,
    default_config: str | None = None,
    can_be_several: bool = False,
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the command line, then calls `main(config, workdir)` and exits if that fails.

    Args:
        main: the launcher; `workdir` exists when it is called.
        config_type: the frozen dataclass that the config file's functions return.
        default_config: path of the config used where `--config` is not given (None: it must be given).
        can_be_several: several processes may run it as one (`--coordinator`).
        argv: arguments without the program's name; None takes them from the process.
    Exit codes: 2 for `InputError` and a wrong command line, 130 after Ctrl-C; SystemExit passes through.
    """
    module = inspect.getmodule(main)
    arguments = _parser(config_type, default_config, module, can_be_several).parse_args(argv)
    try:
        config = load_config(arguments.config, quick=arguments.quick, config_type=config_type)
        flags = [f"{name}=true" for name in FLAGS if getattr(arguments, name, False)]
        config = override(config, [*arguments.set, *flags])
        check(config)
        if arguments.print_config:
            print("\n".join(f"{key}={value}" for key, value in describe(config).items()))
            return
        if can_be_several and arguments.coordinator:
            supervise()
            join(arguments.coordinator, arguments.num_processes, arguments.process_id)
        variant = "-quick" if arguments.quick else ""
        workdir = Path(arguments.workdir or Path("work") / f"{Path(arguments.config).stem}{variant}")
        prepare(workdir)
        with alone(workdir) if is_main() else contextlib.nullcontext():
            main(config, workdir)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_INPUT_ERROR) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what was saved", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None


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
    for name in ("absl", "jax", "orbax", "httpx", "huggingface_hub", "matplotlib", "tensorboardX"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _parser(
    config_type: type, default_config: str | None, module: types.ModuleType | None, can_be_several: bool
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m train.{Path(module.__file__ or '').stem}" if module else None,
        description=inspect.getdoc(module) or "",
        epilog="fields for --set:\n" + "\n".join(field_lines(config_type)),
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
    for name, flag in FLAGS.items():
        if name in typing.get_type_hints(config_type):
            parser.add_argument(flag, action="store_true", help=f"short for --set {name}=true")
    if can_be_several:
        parser.add_argument(
            "--coordinator",
            metavar="HOST:PORT",
            help="several processes train as one: the address of process 0, or auto on SLURM and TPU pods",
        )
        parser.add_argument(
            "--num-processes", type=int, metavar="N", help="with --coordinator: how many there are"
        )
        parser.add_argument(
            "--process-id", type=int, metavar="I", help="with --coordinator: which one this is"
        )
    parser.add_argument("--print-config", action="store_true", help="print the config and stop")
    return parser


def say(text: str) -> None:
    """A line for the person at the keyboard, on standard output."""
    rich.console.Console(quiet=not is_main()).print(text, highlight=False, markup=False, soft_wrap=True)


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
    console = console or rich.console.Console(stderr=True, quiet=not is_main())
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
        is_finished = count > 0 and state["done"] == total
        if is_finished or time.monotonic() - state["printed"] >= silent_seconds:
            state["printed"] = time.monotonic()
            console.print(f"{description} {state['done']}/{total} {text}".rstrip(), highlight=False)

    return advance
