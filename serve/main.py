"""Serves a bundle over HTTP.

    python -m serve.main --bundle work/demo/export/bundle --port 8000

The port answers once the bundle is read and checked; `/ready` says 200 when every program is compiled and the
self-test has passed. SIGTERM refuses what is new, answers what was accepted, for a minute at most, then stops.
"""

import argparse
import asyncio
import dataclasses
import os
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import rich.console
import uvicorn

from jaxsearch.bundle import load_bundle, read_lattice, serving_dtype
from jaxsearch.data.assets import cache_dir
from jaxsearch.errors import InputError
from serve.engine import Engine
from serve.handlers import Limits
from serve.plan import LengthLog, load_lattice
from serve.programs import Misses, load_programs, saved_programs
from serve.protocol import MAX_BODY_BYTES, MAX_ITEMS, number_above, read_milliseconds
from serve.routes import create_app
from serve.telemetry import Telemetry

SHUTDOWN_SECONDS = 60
"""What is not answered so long after SIGTERM is given up."""
REFUSE_SECONDS = 0.5
"""Once all is answered, new requests are told 503 for this long, so that few meet the port just as it closes."""
POLL_SECONDS = 0.05
"""How often a stopping server looks whether all is answered."""


class _Server(uvicorn.Server):
    """Refuses new requests in words before it closes the port: uvicorn alone cuts off those it has not read yet."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine
        self.has_given_up = False
        """Whether requests were left without an answer at the end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        was_ready, begun = self._engine.state == "ready", time.monotonic()
        if was_ready:
            self._engine.refuse()
            while self._is_draining(begun):
                await asyncio.sleep(POLL_SECONDS)
            await asyncio.sleep(REFUSE_SECONDS)
        closing = time.monotonic()
        patience = max(1, round(SHUTDOWN_SECONDS - (closing - begun)))
        self.config.timeout_graceful_shutdown = patience
        await super().shutdown(sockets)
        self.has_given_up = was_ready and (self.force_exit or time.monotonic() - closing >= patience)

    def _is_draining(self, begun: float) -> bool:
        is_over = self.force_exit or time.monotonic() - begun >= SHUTDOWN_SECONDS
        return not is_over and self._engine.batcher.queue_tokens > 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve.main", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bundle", required=True, help="directory written by train.export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default %(default)s)")
    count = number_above(0, int)
    parser.add_argument(
        "--max-items", type=count, default=MAX_ITEMS, help="items per request (default %(default)s)"
    )
    parser.add_argument(
        "--max-body-bytes",
        type=count,
        default=MAX_BODY_BYTES,
        help="bytes per request body (default %(default)s)",
    )
    parser.add_argument(
        "--max-queue-tokens", type=count, help="tokens that may wait before 429 (default: 8 largest launches)"
    )
    parser.add_argument(
        "--slo-ms",
        help="refuse (429) what would probably be answered later than so (default: the queue's limit alone)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the ranker's arithmetic (default: float32 on CPU, bfloat16 elsewhere)",
    )
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="scores are the same bit for bit whatever runs beside them; costs padding",
    )
    parser.add_argument(
        "--save-programs",
        action="store_true",
        help="compile, check, leave the programs in the bundle's folder for machines like this one, and end",
    )
    parser.add_argument(
        "--use-programs",
        action="store_true",
        help="start with the programs that --save-programs left: machine code, so only of bundles that you trust",
    )
    parser.add_argument(
        "--kernel",
        action="store_true",
        help="attention by one kernel, for TPU and GPU; compiled for them, not run on one yet",
    )
    parser.add_argument("--lattice", help="sizes of launches that serve.plan fitted (default: the bundle's)")
    parser.add_argument(
        "--record-lengths", metavar="FILE", help="append every request's lengths, for serve.plan"
    )
    return parser


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", 0) or 0
        reason = os.strerror(number) if number > 0 else str(error)
        raise InputError(
            f"cannot listen on {host}:{port} ({reason}); choose another --port or --host"
        ) from None


def _make_engine(options: argparse.Namespace, console: rich.console.Console) -> Engine:
    """Raises: InputError when the bundle cannot be loaded."""
    if options.kernel and jax.default_backend() == "cpu":
        console.print(
            "warning: on a CPU --kernel is interpreted, which is slow: leave it out", soft_wrap=True
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    bundle = load_bundle(options.bundle, dtype=options.dtype or serving_dtype())
    if options.lattice is not None:
        bundle = dataclasses.replace(bundle, lattice=load_lattice(options.lattice, bundle.lattice))
    return Engine(
        bundle,
        Telemetry(),
        max_queue_tokens=options.max_queue_tokens,
        slo_seconds=None if options.slo_ms is None else read_milliseconds(options.slo_ms, "--slo-ms") / 1000,
        is_batch_invariant=options.batch_invariant,
        use_kernel=options.kernel,
        lengths=None if options.record_lengths is None else LengthLog(options.record_lengths),
    )


def _use_cache(folder: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # where XLA keeps autotuning results, below the folder, would be part of every program's key
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def save_programs(options: argparse.Namespace, console: rich.console.Console) -> None:
    """Compiles and checks everything that the server would, and leaves the programs in the bundle's folder.

    Raises: InputError when the bundle cannot be loaded or written to, or the self-test fails.
    """
    read_lattice(options.bundle)  # before anything is written there
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with saved_programs(options.bundle) as folder:
        _use_cache(folder)
        engine = _make_engine(options, console)
        try:
            engine.prepare()
        except Exception:  # whatever it is, it is told in one line
            raise InputError(f"not saved: {engine.failure}") from None
        finally:
            engine.close()
    console.print("programs for these options on machines like this one are in the bundle's folder")


def _take_programs(bundle: str, cache: Path, console: rich.console.Console) -> bool:
    """Copies the bundle's programs to the cache, whatever options they are of; whether there are any."""
    try:
        count = load_programs(bundle, cache)
    except InputError as error:
        console.print(f"warning: {error}; compiling instead", soft_wrap=True, markup=False)
        return False
    told = f"{count} files of compiled programs for machines like this one are in the bundle's folder"
    console.print(told, soft_wrap=True)
    return True


def serve(options: argparse.Namespace, console: rich.console.Console) -> None:
    """Blocks until the server is told to stop.

    Raises: InputError when the bundle cannot be loaded, the port is taken, or the self-test fails.
    """
    listener = _listen(options.host, options.port)
    cache = cache_dir() / "xla"
    _use_cache(cache)
    engine = _make_engine(options, console)
    has_programs = options.use_programs and _take_programs(options.bundle, cache, console)
    address = f"http://{options.host}:{listener.getsockname()[1]}"

    def on_prepared() -> None:
        misses.close()
        if engine.failure is not None:
            server.should_exit = True
            return
        if has_programs and misses.count:
            told = "what the bundle's folder has is of other options or another version"
            told = f"warning: {told}: {misses.count} compiled; save them too with --save-programs"
            console.print(told, soft_wrap=True)
        programs = f"{engine.num_programs} programs, {misses.count} of them compiled now"
        console.print(f"ready after {engine.ready_seconds:.1f} s with {programs}: {address}", soft_wrap=True)

    app = create_app(engine, Limits(options.max_items, options.max_body_bytes), on_prepared=on_prepared)
    misses = Misses()  # of what is compiled from here on: the server's programs
    config = uvicorn.Config(app, log_level="warning")
    server = _Server(config, engine)
    console.print(f"{engine.bundle.name} on {address}, compiling ...", soft_wrap=True)
    # uvicorn raises the signal again once it has stopped: SIGTERM then ends here, and the exit code is 0.
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    server.run(sockets=[listener])
    if engine.failure is not None:
        raise InputError(f"not ready: {engine.failure}")
    if server.has_given_up:
        console.print("stopped; what was not answered by now is given up")
    else:
        console.print("stopped; everything that was accepted is answered")


def main() -> None:
    options = _parser().parse_args()
    console = rich.console.Console()
    try:
        (save_programs if options.save_programs else serve)(options, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
