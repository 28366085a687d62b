"""The one training loop: a trainer gives a loss and its batches, this takes the steps.

The host never waits for a step: losses are fetched every `log_every` steps, one step late, while the devices work
on. What a loss that is no number does meanwhile is said in `step`: nothing.

A run that is started again goes on from its newest whole checkpoint, with the same batches (they are a function of
the step), random keys and optimiser state; on CPU it ends with the parameters of a run never stopped, bit for bit.
One step: `train.step`. Layout on the mesh: `jaxsearch.sharding`. Storage: `jaxsearch.checkpoints`.
"""

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
from flax import nnx

from jaxsearch.checkpoints import Restored, TrainCheckpoints
from jaxsearch.errors import InputError
from train.config import Count, CountOrNone
from train.options import EXIT_INTERRUPTED, progress
from train.processes import agree, is_main
from train.speed import flops_per_token, matmul_peak
from train.step import SUMMED, LossFn, MeshConfig, OptimizerConfig, TrainStep

Batches = Callable[[int], Iterator[Any]]
SPEEDS = {
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.0%}",
    "padding_share": "padding {:.1%}",
    "input_share": "making batches {:.0%} of the time",
}
"""What is said of a run's speed; see `train.speed`."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long, and what happens on the way."""

    num_steps: Count
    log_every: Count = 10
    checkpoint_every: CountOrNone = 0
    """0: at the end, and where `evaluate_every` with `best_metric` needs one."""
    evaluate_every: CountOrNone = 0
    """0: at the end only."""
    keep_checkpoints: Count = 2
    """Newest ones; the best one stays besides."""
    best_metric: str | None = None
    """Metric of `evaluate`, higher is better: the model ends with the parameters of its best evaluation."""
    seed: int = 0
    """Of the random keys that a loss with a `key` argument gets."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclasses.dataclass(frozen=True)
class FitResult:
    """`step` reached; the last evaluation (of the best step, where there is a best metric) and the last training
    metrics; wall seconds and tokens of this process alone."""

    step: int
    metrics: dict[str, float]
    best_step: int | None
    seconds: float
    tokens: int


def fit(
    model: nnx.Module,
    loss_fn: LossFn,
    batches: Batches,
    *,
    loop: LoopConfig,
    optimizer: OptimizerConfig,
    workdir: str | Path,
    trainable: Any = nnx.Param,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    dtype: str = "float32",
    token_flops: int | None = None,
    console: rich.console.Console | None = None,
) -> FitResult:
    """Trains `model` in place.

    Args:
        loss_fn: `(model, batch) → (total, count, metrics)`, scalars; the loss is Σ total / Σ count over microbatches
            and devices, metrics are means weighted by count, "tokens" and "slots" (`losses.token_counts`) sums. With a
            third argument named `key` it gets a random key that depends on seed, step and microbatch only.
        batches: `batches(n)` iterates over the batches of steps n, n + 1, ... (from 0), pytrees of NumPy arrays with
            the batch as leading axis, divisible by accumulate * data * fsdp. A new shape compiles once.
        workdir: holds `checkpoints/`, `metrics.jsonl` and `tensorboard/`; a run found there is continued.
        trainable: NNX filter; the rest of the model gets neither gradient nor checkpoint.
        evaluate: takes the model as it is, gives metrics. It must not keep the model: its arrays are reused.
        dtype: of the computation, for the peak that MFU is stated of (`train.speed`).
        token_flops: FLOPs a token, where the model has parts that do not read the tokens which the loss counts.
    Returns:
        what was reached; the model holds the best parameters by `loop.best_metric`, else the last ones.
    Raises:
        InputError: the loss is not finite (steps named), a batch that does not divide, a layout that the mesh does
            not allow, batches that end early, nothing trainable, checkpoints of another model.
        SystemExit: after a signal and a checkpoint: code 0 for SIGTERM, 130 for SIGINT (Ctrl-C).
        KeyboardInterrupt: a second SIGINT; nothing is saved.
    """
    workdir = Path(workdir)
    console = console or rich.console.Console(stderr=True, quiet=not is_main())

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if loop.log_every < 1:
        raise InputError("log_every must be at least 1")
    if evaluate is None and (loop.evaluate_every or loop.best_metric):
        raise InputError(
            "loop.evaluate_every and loop.best_metric: this trainer measures nothing while it trains"
        )
    program = TrainStep(
        model,
        loss_fn,
        optimizer=optimizer,
        mesh=loop.mesh,
        num_steps=loop.num_steps,
        seed=loop.seed,
        trainable=trainable,
    )
    store = TrainCheckpoints(
        workdir / "checkpoints", keep=loop.keep_checkpoints, best_metric=loop.best_metric, say=say
    )
    with store, _Termination() as termination, _Journal(workdir) as journal:
        run = _Run(program, store, journal, loop, evaluate)
        run.seconds_per_token = (token_flops or flops_per_token(model, trainable)) / matmul_peak(dtype)
        run.resume(say)
        if run.step < loop.num_steps:
            steps = batches(run.step)
            with progress("training", loop.num_steps, done=run.step, console=console) as advance:
                while run.step < loop.num_steps:
                    run.take(steps, advance)
                    if stop := termination.due(run.step, loop):
                        run.save()
                        store.wait()
                        saved = store.latest_step()
                        say(
                            f"{stop.name}: stopped after step {run.step}; the same command goes on from "
                            + ("the start" if saved is None else f"step {saved}, saved in {store.directory}")
                        )
                        raise SystemExit(0 if stop is signal.SIGTERM else EXIT_INTERRUPTED)
            run.say_speed(say)
        return run.finish(model, say)


class _Run:
    """The state of one call of `fit`, and what happens around a step."""

    def __init__(
        self,
        program: TrainStep,
        store: TrainCheckpoints,
        journal: "_Journal",
        loop: LoopConfig,
        evaluate: Callable[[Any], Mapping[str, float]] | None,
    ):
        self.program, self.store, self.journal, self.loop, self.evaluate = (
            program,
            store,
            journal,
            loop,
            evaluate,
        )
        self.state = program.initial_state()
        self.step = 0
        self.evaluation: dict[str, float] = {}
        self.logged: dict[str, float] = {}
        self.tokens = 0
        self.seconds_per_token = 0.0
        """At the peak of the device."""
        self._speeds: list[list[float]] = []
        self._input_seconds = 0.0
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._started = self._fetched_at = time.perf_counter()

    def resume(self, say: Callable[[str], None]) -> None:
        restored = self.store.restore(self.state)
        if restored is not None:
            self._adopt(restored)
            say(f"resumed from step {self.step} of {self.loop.num_steps}, saved in {self.store.directory}")
        self.journal.start(self.step)
        self._fetched_at = time.perf_counter()

    def take(self, steps: Iterator[Any], advance: Callable[..., None]) -> None:
        """One step, then whatever is due after it."""
        asked = time.perf_counter()
        batch = next(steps, None)
        self._input_seconds += time.perf_counter() - asked
        if batch is None:
            raise InputError(
                f"the batches end before step {self.step} of {self.loop.num_steps}; give more of them"
            )
        self.state, metrics = self.program.take(self.state, batch)
        self.step += 1
        self._pending.append((self.step, metrics))
        advance()
        if _is_due(self.step - 1, self.loop.log_every):
            self.fetch(leave=1)
            advance(0, self._summary())
        at_end = self.step == self.loop.num_steps
        has_evaluation = self.evaluate is not None and (
            at_end or _is_due(self.step, self.loop.evaluate_every)
        )
        if has_evaluation or at_end or _is_due(self.step, self.loop.checkpoint_every):
            self.fetch(leave=0)
            paused = time.perf_counter()
            if has_evaluation:
                self._evaluate()
            needs_best = has_evaluation and self.loop.best_metric is not None
            if needs_best or at_end or _is_due(self.step, self.loop.checkpoint_every):
                self.save(self.evaluation if has_evaluation else None)
            self._fetched_at += time.perf_counter() - paused

    def fetch(self, *, leave: int) -> None:
        """Reads the metrics of all steps but the newest `leave`, logs their means, stops on a loss that is no number.

        Raises:
            InputError: such a loss; all its steps among those read are named.
        """
        count = len(self._pending) - leave
        ready, self._pending = self._pending[:count], self._pending[count:]
        if not ready:
            return
        fetched = [(step, jax.device_get(metrics)) for step, metrics in ready]
        bad = [step for step, metrics in fetched if not math.isfinite(metrics["loss"] + metrics["grad_norm"])]
        if bad:
            saved = self.store.latest_step()
            raise InputError(
                f"the loss or its gradient is not finite at step {', '.join(map(str, bad))}; nothing was applied from "
                f"step {bad[0]} on (its batch is number {bad[0] - 1}, counted from 0) and the newest checkpoint is "
                f"{'none' if saved is None else f'of step {saved}'}. Lower the learning rate, or look at the batch"
            )
        now = time.perf_counter()
        seconds, self._fetched_at = now - self._fetched_at, now
        tokens, slots = (sum(float(metrics.pop(name, 0.0)) for _, metrics in fetched) for name in SUMMED)
        self.tokens += int(tokens)
        names = fetched[-1][1]
        self.logged = {name: float(np.mean([metrics[name] for _, metrics in fetched])) for name in names}
        self.logged |= {
            "steps_per_second": len(fetched) / seconds,
            "input_share": self._input_seconds / seconds,
        }
        self._input_seconds = 0.0
        if tokens:
            rate = tokens / seconds
            self.logged |= {"tokens_per_second": rate, "mfu": rate * self.seconds_per_token}
        if slots:
            self.logged["padding_share"] = 1.0 - tokens / slots
        if self.logged.keys() >= SPEEDS.keys():
            self._speeds.append([self.logged[name] for name in SPEEDS])
        self.journal.write(fetched[-1][0], self.logged)

    def save(self, metrics: Mapping[str, float] | None = None) -> None:
        self.fetch(leave=0)
        self.store.save(self.step, self.state, metrics=metrics)

    def finish(self, model: nnx.Module, say: Callable[[str], None]) -> FitResult:
        """Puts the best, else the last, parameters into the model."""
        best = self.store.best_step() if self.loop.best_metric is not None else None
        if best is not None and best != self.step:
            restored = self.store.restore(self.state, step=best)
            if restored is None:
                say(f"the best checkpoint (step {best}) cannot be read; the model keeps the last parameters")
                best = None
            else:
                self.state, self.evaluation = restored.arrays, restored.metrics
        self.program.update(model, self.state)
        metrics = self.logged | self.evaluation
        return FitResult(self.step, metrics, best, time.perf_counter() - self._started, self.tokens)

    def say_speed(self, say: Callable[[str], None]) -> None:
        """Medians of what was logged, without the first time where there are more: it holds the compiling."""
        if not self._speeds:
            return
        medians = np.median(self._speeds[1:] or self._speeds, axis=0)
        shown = [text.format(value) for text, value in zip(SPEEDS.values(), medians.tolist(), strict=True)]
        note = "" if self._speeds[1:] else " (compiling included: one record)"
        say("this run: " + ", ".join(shown) + note)

    def _adopt(self, restored: Restored) -> None:
        self.state, self.step, self.evaluation = restored.arrays, restored.step, restored.metrics

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        self.evaluation = {
            name: float(value) for name, value in self.evaluate(self.program.model(self.state)).items()
        }
        best = self.loop.best_metric
        if best is not None and best not in self.evaluation:
            raise InputError(
                f"best_metric {best!r} is not among what was evaluated: {', '.join(self.evaluation)}"
            )
        self.journal.write(self.step, {f"evaluate/{name}": value for name, value in self.evaluation.items()})

    def _summary(self) -> str:
        if not self.logged:
            return ""
        shown = [text.format(self.logged[name]) for name, text in SPEEDS.items() if name in self.logged]
        return ", ".join([f"loss {self.logged['loss']:.4f}", *shown[:2]])


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Termination:
    """Notes SIGTERM and the first SIGINT instead of dying of them; only the main thread may ask for that."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "_Termination":
        if self._is_main:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def due(self, step: int, loop: LoopConfig) -> signal.Signals | None:
        """The signal to stop for after this step; several processes ask each other, every `log_every` steps."""
        if jax.process_count() > 1:
            is_asked = _is_due(step, loop.log_every) or step == loop.num_steps
            found = agree(self.signal or 0) if is_asked else 0
            return signal.Signals(found) if found else None
        return self.signal

    def _note(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)


class _Journal:
    """`metrics.jsonl`, one line per record, and the same for TensorBoard where tensorboardX is installed."""

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._file: Any = None
        self._board: Any = None

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *_) -> None:
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()

    def start(self, step: int) -> None:
        """Opens the files after `step`; lines that a killed run wrote beyond it are dropped, as they come again."""
        if not is_main():
            return
        self._workdir.mkdir(parents=True, exist_ok=True)
        path = self._workdir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(self._workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name.replace("@", "_"), value, step)  # TensorBoard's names have no @


def _step_of(line: str) -> float:
    """The step of a record; a line cut off by a kill counts as later than any."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
