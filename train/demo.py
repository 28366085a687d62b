"""Runs a whole pipeline, stage after stage, then asks the server it made a question.

    python -m train.demo --config configs/demo/pipeline.py --workdir work/demo

Each stage is one of the launchers, in a process of its own, with a config that anybody can run alone. A finished
stage leaves `stage.json`; the same command skips it and goes on. `configs/reference/pipeline.py` is the same path at
full size.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rich.console
import rich.table

from jaxsearch.data.verticals import load_vertical
from jaxsearch.errors import InputError
from jaxsearch.files import read_object, write_json
from train.config import CountOrNone
from train.options import run
from train.processes import run_child
from train.report import compact

READY_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Stage:
    """One launcher with its config. `inputs` are config values in which `{workdir}` is the pipeline's."""

    name: str
    launcher: str
    config: str
    says: str
    leaves: str = ""
    """A path in the stage's folder that only a finished run leaves."""
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """The stages in order, and the question that the finished server is asked."""

    title: str
    stages: tuple[Stage, ...]
    is_quick: bool = False
    """Every stage runs the quick variant of its config."""
    bundle: str = "export/bundle"
    """Where the last stage leaves the serving bundle, inside the workdir; empty: no server is started."""
    question: str = "Negotiate labor disputes."
    port: CountOrNone = 0
    """Of the server that answers; 0 takes a free one."""
    closing: str = ""
    """What the budget of this pipeline can and cannot show."""
    advice: str = ""
    """A further command worth trying."""


def stage_command(stage: Stage, config: PipelineConfig, workdir: Path) -> list[str]:
    command = ["-m", stage.launcher, "--config", stage.config, "--workdir", str(workdir / stage.name)]
    if config.is_quick:
        command.append("--quick")
    if stage.inputs:
        command += [
            "--set",
            *(f"{key}={value.format(workdir=workdir)}" for key, value in stage.inputs.items()),
        ]
    return command


def fingerprint(command: list[str], before: str) -> str:
    """Of the command, all of the config that it resolves to, the vertical's files, and the stages `before` it."""
    shown = subprocess.run(
        [sys.executable, *command, "--print-config"], capture_output=True, text=True, check=False
    )
    if shown.returncode:
        raise InputError(f"python {' '.join(command)} cannot start: {shown.stderr.strip()[-600:]}")
    digest = hashlib.sha256("\n".join([before, *command, shown.stdout]).encode())
    vertical = next((line for line in shown.stdout.splitlines() if line.startswith("vertical=")), None)
    if vertical:
        digest.update(load_vertical(vertical.partition("=")[2]).fingerprint().encode())
    return digest.hexdigest()[:12]


def run_stage(
    stage: Stage, config: PipelineConfig, workdir: Path, before: str, console: rich.console.Console
) -> tuple[str, float]:
    """Runs a stage unless it is done; returns its fingerprint and its seconds (0 when it was done before).

    Raises: InputError when it fails, or was done with another config.
    """
    command = stage_command(stage, config, workdir)
    marker = workdir / stage.name / "stage.json"
    identity = fingerprint(command, before)
    if marker.exists():
        if read_object(marker).get("config") != identity:
            raise InputError(
                f"stage {stage.name} in {workdir} was done with another config: delete {workdir / stage.name} and the "
                "stages after it, or choose another --workdir"
            )
        console.print(f"[green]done before[/]  {stage.name}")
        return identity, 0.0
    console.rule(f"[bold]{stage.name}[/] · {stage.says}", align="left")
    console.print(f"[dim]python {' '.join(command)}[/]", highlight=False, soft_wrap=True)
    started = time.monotonic()
    status = run_child([sys.executable, *command])
    if status:
        raise InputError(
            f"stage {stage.name} failed (exit {status}); mend what it says above, then repeat the command"
        )
    if stage.leaves and not (workdir / stage.name / stage.leaves).exists():
        raise InputError(
            f"stage {stage.name} was stopped before it was finished; the same command goes on with it"
        )
    seconds = time.monotonic() - started
    write_json(marker, {"config": identity, "seconds": round(seconds, 1)})
    return identity, seconds


@contextlib.contextmanager
def serving(bundle: Path, port: int, log: Path) -> Iterator[str]:
    """The real server on loopback, ready to score; yields its address and stops it afterwards."""
    if port == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "serve.main", "--bundle", str(bundle), "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, address, log)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(process: subprocess.Popen, address: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise InputError(
                f"the server stopped before it was ready; its log {log} ends: {log.read_text()[-500:]}"
            )
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(f"{address}/ready", timeout=5) as reply,
        ):
            if reply.status == 200:
                return
        time.sleep(0.5)
    raise InputError(f"the server was not ready within {READY_SECONDS} s; see {log}")


def ask(address: str, question: str, *, top_k: int = 5) -> dict[str, Any]:
    body = json.dumps({"query": question, "top_k": top_k}).encode()
    request = urllib.request.Request(
        f"{address}/v1/search", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def show_answer(console: rich.console.Console, question: str, answer: dict[str, Any]) -> None:
    table = rich.table.Table(title=f"“{question}”", title_justify="left", box=None)
    for column in ("rank", "score", "document"):
        table.add_column(column, justify="left" if column == "document" else "right")
    for result in answer["results"]:
        title = result["fields"].get("title", result["id"])
        score = "" if result["score"] is None else f"{result['score']:.3f}"
        table.add_row(str(result["rank"]), score, f"{title} ({result['id']})")
    console.print(table)
    stages = ", ".join(f"{name} {value:.0f} ms" for name, value in answer["timings_ms"].items())
    console.print(f"timings: {stages}", highlight=False)


def peak_gigabytes() -> float:
    """The largest resident set of any stage of this run, in GB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def next_steps(console: rich.console.Console, config: PipelineConfig, workdir: Path) -> None:
    console.rule("[bold]what to try next[/]", align="left")
    lines = [
        f"make serve BUNDLE={workdir / config.bundle}",
        'curl -s localhost:8000/v1/search -d \'{"query": "Repair aircraft engines", "top_k": 3}\' '
        "-H 'Content-Type: application/json'",
        config.advice,
    ]
    for line in filter(None, lines):
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def main(config: PipelineConfig, workdir: Path) -> None:
    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    if shutil.disk_usage(workdir).free < 6e9:
        raise InputError(f"{workdir} has less than 6 GB free: choose another --workdir")
    console.print(f"[bold]{config.title}[/]\n{len(config.stages)} stages, work in {workdir}", highlight=False)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    spent, before = {}, ""
    for stage in config.stages:
        before, spent[stage.name] = run_stage(stage, config, workdir, before, console)
    answer: dict[str, Any] | None = None
    if config.bundle:
        console.rule("[bold]ask the server[/]", align="left")
        with serving(workdir / config.bundle, config.port, workdir / "server.log") as address:
            answer = ask(address, config.question)
        write_json(workdir / "answer.json", answer)
    console.rule("[bold]results[/]", align="left")
    report = workdir / "evaluate" / "report.json"
    if report.exists():
        written = read_object(report)
        console.print(compact(written))
        if reason := written["notes"].get("order_reason"):
            console.print(reason, highlight=False, soft_wrap=True)
        console.print(
            f"the whole of it: {report.with_suffix('.html')}, {report.with_suffix('.md')}", highlight=False
        )
    if answer is not None:
        show_answer(console, config.question, answer)
    minutes = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in spent.items() if seconds)
    console.print(
        f"minutes: {minutes or 'all stages were done before'}; peak memory {peak_gigabytes():.1f} GB"
    )
    if config.closing:
        console.print(config.closing, highlight=False, soft_wrap=True)
    next_steps(console, config, workdir)


if __name__ == "__main__":
    run(main, PipelineConfig)
