"""Scores many items of many requests by one forward pass and no decoding.

A request's prefix (system text and query) stands once in a launch; every item attends to it and to itself, so its
score is the one it would have alone. What all prefixes begin with (a judge's policy) is computed once for all
launches. Only the label rows of the output matrix are multiplied. A launch's size makes its program, compiled ahead by
`compile()` or at its first use.

Not here: what goes into a launch (`packing`), prompts (`data.prompts`), turning label logits into a score (`ranker`,
`judge`), queues (`serve.batcher`).
"""

import concurrent.futures
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxsearch.buckets import Lattice
from jaxsearch.errors import InputError
from jaxsearch.nn.layers import narrow_weights
from jaxsearch.nn.packed import PackedPrompts
from jaxsearch.nn.packed_kernel import check_width
from jaxsearch.nn.transformer import Decoder, KeyValues
from jaxsearch.scoring.packing import MAX_LABELS, Launch, ScoreRequest, Shapes, fill_launches, unpack
from jaxsearch.sharding import on_one_device

CPU_LAUNCHES = 2
"""Launches that run at once on CPU: attention's small products keep one core busy, the maps of the other launch the
rest. On an accelerator `score` queues its launches without waiting."""


class PrefillScorer:
    """Label logits of items after a shared prefix, on one device; several threads may run launches.

    Args:
      decoder: any `Decoder`; its weights are arguments of the programs, on the first device, in the dtype that it
        computes in.
      label_token_ids: at most `MAX_LABELS` token ids.
      lattice: sizes of launches, and what a prompt may have (its prefix without `base`).
      base: tokens that every request's prefix begins with; computed once.
      is_batch_invariant: one shape and one place for all: a score is the same bit for bit whatever runs beside it,
        for more padding.
      use_kernel: attention by `nn.packed_kernel`, for accelerators; on CPU it is interpreted, which is slow.
    """

    def __init__(
        self,
        decoder: Decoder,
        label_token_ids: Sequence[int],
        lattice: Lattice,
        *,
        base: Sequence[int] = (),
        is_batch_invariant: bool = False,
        use_kernel: bool = False,
    ) -> None:
        self._graph, weights = nnx.split(narrow_weights(decoder))
        self._weights = on_one_device(weights)
        self._vocab_size = decoder.config.vocab_size
        self.label_token_ids = self._checked_labels(label_token_ids)
        if use_kernel:
            check_width(decoder.config.head_dim)
        self.lattice, self.base, self.use_kernel = lattice, tuple(base), use_kernel
        self.shapes = Shapes(lattice, is_batch_invariant=is_batch_invariant)
        if self.base and is_batch_invariant:
            raise InputError("a base and batch invariance do not go together: leave the base in the prefixes")
        longest = len(self.base) + lattice.max_prefix_tokens + lattice.max_item_tokens
        if longest > decoder.config.max_positions:
            raise InputError(
                f"prefix and item may have {longest} tokens together, the model has "
                f"{decoder.config.max_positions} positions; lower the prompt's token limits"
            )
        self._base_states: KeyValues | None = None
        self._programs: dict[int, Callable[..., Any]] = {}
        self._lock = threading.Lock()
        self._compiling = {size: threading.Lock() for size in self.shapes.launches}
        self.num_compilations = 0

    @property
    def num_concurrent(self) -> int:
        """How many launches are best run at once, each from a thread of its own."""
        return CPU_LAUNCHES if jax.default_backend() == "cpu" else 1

    def compile(self) -> int:
        """Compiles every program now, several at a time; returns how many there are."""
        self._state()
        with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(self._program, self.shapes.launches))
        return self.num_compilations

    def use_weights(self, decoder: Decoder) -> None:
        """Scores with this decoder's weights from now on, wherever they are; same shapes: nothing is compiled again."""
        with self._lock:
            self._weights = on_one_device(nnx.state(narrow_weights(decoder)))
            self._base_states = None

    def checked(self, request: ScoreRequest) -> ScoreRequest:
        """The request as launches take it: its prefix without `base`, its labels stated.

        Raises: InputError when its prefix or an item is empty or too long, its prefix does not begin with `base`, or a
        label is not a token of the model.
        """
        if not request.prefix:
            raise InputError("the shared prefix has no tokens; give a query")
        prefix, base = request.prefix, self.base
        if prefix[: len(base)] != base:
            raise InputError(f"the shared prefix does not begin with the scorer's {len(base)} base tokens")
        prefix = prefix[len(base) :]
        for text in (prefix, *request.items):
            if text and not 0 <= min(text) <= max(text) < self._vocab_size:
                raise InputError(
                    f"token ids must be in 0..{self._vocab_size - 1}; got {min(text)}..{max(text)}"
                )
        if len(prefix) > self.lattice.max_prefix_tokens:
            raise InputError(
                f"a prefix of {len(prefix)} tokens does not fit: at most {self.lattice.max_prefix_tokens}; "
                "shorten the query"
            )
        for item in request.items:
            if not len(item):
                raise InputError("an item without tokens cannot be scored; give it text")
            if len(item) > self.lattice.max_item_tokens:
                raise InputError(
                    f"an item of {len(item)} tokens does not fit: at most {self.lattice.max_item_tokens}; "
                    "shorten the text"
                )
        labels = self.label_token_ids
        if request.label_token_ids is not None:
            labels = self._checked_labels(request.label_token_ids)
        return ScoreRequest(prefix, request.items, labels)

    def plan(self, requests: Sequence[ScoreRequest]) -> list[Launch]:
        """Launches for all items, filled in the order given. Raises: InputError as `checked` does."""
        return fill_launches(self.shapes, [self.checked(request) for request in requests])

    def start(self, launch: Launch) -> jax.Array:
        """Runs a launch, on an accelerator without waiting; `finish` keeps the rows that items asked for."""
        ints, labels = launch.arrays(base_tokens=len(self.base))
        program = self._program(launch.padded_tokens)
        return program(*self._state(), ints, labels)

    @staticmethod
    def finish(launch: Launch, logits: jax.Array) -> list[np.ndarray]:
        """Waits for `start`'s result; float32 [items, labels] for each part of the launch."""
        rows, found, start = np.asarray(logits), [], 0
        for part in launch.parts:
            end = start + len(part.items)
            found.append(rows[start:end, : len(part.label_token_ids)])
            start = end
        return found

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
        """Label logits of every item of every request.

        Returns: for each request float32 [items, labels], in the order given.
        Raises: InputError as `checked` does.
        Accuracy: within 1e-5 of the largest logit from scoring prefix + item alone in float32; measured 1.2e-7 of
        logits near 1 in `tests/test_prefill.py`.
        """
        launches = self.plan(requests)
        if len(launches) > 1 and self.num_concurrent > 1:
            with concurrent.futures.ThreadPoolExecutor(self.num_concurrent) as pool:
                pending = list(pool.map(self.start, launches))
        else:
            pending = [self.start(launch) for launch in launches]
        results = [
            np.zeros((len(request.items), len(request.label_token_ids or self.label_token_ids)), np.float32)
            for request in requests
        ]
        for launch, logits in zip(launches, pending, strict=True):
            for part, rows in zip(launch.parts, self.finish(launch, logits), strict=True):
                results[part.owner][part.positions] = rows
        return results

    def _state(self) -> tuple[Any, KeyValues | None]:
        """The weights, and the keys and values of `base` that belong to them, computed at their first use."""
        with self._lock:
            if self.base and self._base_states is None:
                tokens = np.array([self.base], np.int32)
                self._base_states = _read_base(self._graph, self._weights, tokens)
            return self._weights, self._base_states

    def _program(self, size: int) -> Callable[..., Any]:
        """The compiled program of a launch's size."""
        with self._compiling[size]:
            if size not in self._programs:
                self._programs[size] = self._compiled(size)
            return self._programs[size]

    def _compiled(self, size: int) -> Callable[..., Any]:
        structure = self.shapes.structure(size)
        leaves = jax.tree.leaves(structure, is_leaf=lambda node: type(node) is tuple)
        run = functools.partial(_run, self._graph, structure, self.shapes.windows, self.use_kernel)
        lowered = jax.jit(run).lower(
            *self._state(),
            jax.ShapeDtypeStruct((sum(int(np.prod(shape)) for shape in leaves),), jnp.int32),
            jax.ShapeDtypeStruct((self.shapes.ends(size), MAX_LABELS), jnp.int32),
        )
        program = lowered.compile()
        with self._lock:
            self.num_compilations += 1
        return program

    def _checked_labels(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        if not 1 <= len(token_ids) <= MAX_LABELS:
            raise InputError(f"give 1 to {MAX_LABELS} label tokens; got {len(token_ids)}")
        if wrong := [token for token in token_ids if not 0 <= token < self._vocab_size]:
            raise InputError(f"label token ids must be in 0..{self._vocab_size - 1}; got {wrong}")
        return tuple(token_ids)


@functools.partial(jax.jit, static_argnums=0)
def _read_base(graph: Any, weights: Any, tokens: Int[Array, "1 p"]) -> KeyValues:
    return nnx.merge(graph, weights).prefill(tokens, jnp.ones(tokens.shape, bool))[1]


def _run(
    graph: Any,
    structure: PackedPrompts,
    windows: tuple[tuple[int, int], ...],
    use_kernel: bool,
    weights: Any,
    base: KeyValues | None,
    ints: Int[Array, "ints"],
    label_token_ids: Int[Array, "m labels"],
) -> Float[Array, "m labels"]:
    decoder = nnx.merge(graph, weights)
    hidden = decoder.read_packed(unpack(ints, structure), windows, base, use_kernel)
    return decoder.logits(hidden, label_token_ids)
