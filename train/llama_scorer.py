"""Scoring a query's documents in llama.cpp, through the C interface of `llama-cpp-python`.

To compare speed with, nothing else. Weights are those of a folder that we saved, written as GGUF; prompts are given as
tokens, so the file has no tokenizer. Imported only where llama.cpp is installed: `ways` asks first.
"""

import ctypes
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from jaxtyping import Float

from jaxsearch.errors import InputError
from jaxsearch.nn.tensors import list_safetensors
from jaxsearch.nn.transformer import DecoderConfig

logging.getLogger("gguf").setLevel(logging.WARNING)
BATCH_TOKENS = {"float32": 512, "bfloat16": 1024}
"""Of a call, whole prompts in order, and of a step inside it: the fastest of 256 to 2048.

Plain attention looks at every cell of the cache, so that 2048 takes 1.9 times as long as 512; flash attention depends
on it less, and on 512 or 1024 hardly. One cache for all sequences is 1.4 times as fast as a stream for each.
"""
WEIGHTS = {"float32": "F32", "bfloat16": "BF16"}
"""Of matrices, vectors being F32 as llama.cpp wants them. F16 takes 1.3 times as long as BF16 where a CPU
multiplies BF16 (AVX512)."""


@llama_cpp.llama_log_callback
def _say_nothing(level: int, text: bytes, data: Any) -> None:
    pass


def num_threads() -> int:
    return len(os.sched_getaffinity(0))


def write_gguf(path: Path, folder: Path, config: DecoderConfig, dtype: str) -> None:
    """The weights of `folder` under llama.cpp's names, with the rows of q and k in its order where it has its own.

    Raises: InputError for what is not written here: a RoPE scaling, a tensor that the family lacks in llama.cpp.
    """
    if config.rope_scaling:
        raise InputError("a decoder with a RoPE scaling is not written as GGUF; leave llama.cpp out")
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[config.family], config.num_layers)
    writer = gguf.GGUFWriter(path, config.family)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    for tensor in list_safetensors(folder):
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"{tensor.name} has no name in a GGUF of {config.family}; leave llama.cpp out")
        values = np.asarray(tensor.read(), np.float32)
        if config.family == "llama" and (".q_proj." in tensor.name or ".k_proj." in tensor.name):
            halves = values.reshape(-1, 2, config.head_dim // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        kind = gguf.GGMLQuantizationType[WEIGHTS[dtype] if values.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaScorer:
    """A GGUF file in llama.cpp on all cores; a score is yes minus no at a prompt's last position.

    With `use_flash` keys and values are rounded to F16, which is llama.cpp's own choice and its fastest; without it
    they are float32, as everything else is in a file of F32.
    """

    def __init__(self, path: Path, labels: tuple[int, int], *, dtype: str, max_tokens: int, use_flash: bool):
        llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p())
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not model:
            raise InputError(f"{path}: llama.cpp does not load it")
        self.labels, self.batch_tokens = labels, max(BATCH_TOKENS[dtype], max_tokens)
        self.max_sequences = llama_cpp.llama_max_parallel_sequences()
        asked = llama_cpp.llama_context_default_params()
        asked.n_ctx = max_tokens + self.batch_tokens
        asked.n_batch = asked.n_ubatch = self.batch_tokens
        asked.n_seq_max = self.max_sequences
        asked.n_threads = asked.n_threads_batch = num_threads()
        asked.kv_unified = True
        asked.flash_attn_type = int(use_flash)
        asked.type_k = asked.type_v = llama_cpp.GGML_TYPE_F16 if use_flash else llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(model, asked)
        if not self.context:
            llama_cpp.llama_model_free(model)
            raise InputError(f"{path}: llama.cpp makes no context for it")
        weakref.finalize(self, _free, self.context, model)

    def __call__(self, prefix: Sequence[int], items: Sequence[Sequence[int]]) -> Float[np.ndarray, "c"]:
        """Of items behind a prefix that is computed once; it may be empty, the items then being whole prompts."""
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, False)
        batches = list(self._batches(items))
        if prefix:
            self._decode([prefix], first_sequence=0, start=0)
            for sequence in range(1, 1 + max(map(len, batches), default=0)):
                llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        scores = np.zeros(len(items), np.float32)
        for rows in batches:
            ends = self._decode([items[row] for row in rows], first_sequence=1, start=len(prefix))
            logits = [llama_cpp.llama_get_logits_ith(self.context, end) for end in ends]
            scores[rows] = [row[self.labels[0]] - row[self.labels[1]] for row in logits]
            llama_cpp.llama_memory_seq_rm(memory, -1, len(prefix), -1)
        return scores

    def _batches(self, items: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        rows, tokens = [], 0
        for row, item in enumerate(items):
            if rows and (tokens + len(item) > self.batch_tokens or len(rows) == self.max_sequences - 1):
                yield rows
                rows, tokens = [], 0
            rows.append(row)
            tokens += len(item)
        if rows:
            yield rows

    def _decode(self, parts: Sequence[Sequence[int]], *, first_sequence: int, start: int) -> list[int]:
        """Each part continues a sequence of its own at position `start`; returns the places of their ends."""
        sizes = [len(part) for part in parts]
        ends = np.cumsum(sizes) - 1
        sequences = np.repeat(np.arange(first_sequence, first_sequence + len(parts), dtype=np.int32), sizes)
        count = len(sequences)
        is_end = np.zeros(count, np.int8)
        is_end[ends] = 1
        given = {
            "token": np.concatenate([np.asarray(part, np.int32) for part in parts]),
            "pos": np.concatenate([np.arange(start, start + size, dtype=np.int32) for size in sizes]),
            "n_seq_id": np.ones(count, np.int32),
            "seq_id": sequences.ctypes.data + sequences.itemsize * np.arange(count, dtype=np.uintp),
            "logits": is_end,
        }
        kinds: dict[str, Any] = dict(llama_cpp.llama_batch._fields_)
        pointers = {name: ctypes.cast(array.ctypes.data, kinds[name]) for name, array in given.items()}
        status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch(n_tokens=count, **pointers))
        if status:
            raise InputError(f"llama.cpp does not decode {count} tokens: status {status}")
        return ends.tolist()


def _free(context: Any, model: Any) -> None:
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
