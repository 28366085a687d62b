"""Text to token ids and back: a Hugging Face `tokenizer.json`, or a tokenizer built from GGUF metadata.

Two encoders stand behind one face. `encode_batch` is for text that someone else wrote: nothing in it ever
becomes a special token, whatever it looks like. `encode_template` is for text of ours, where `<|im_start|>`
means the token. Prompts are put together in `prompts`, batches in `batches`.
"""

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import tokenizers

from jaxsearch.errors import InputError
from jaxsearch.files import read_object

_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_GGUF_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_CONTROL = 3
_GGUF_USER_DEFINED = 4
# llama.cpp's names of pre-tokenizers -> the same rule in `tokenizers`.
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
}
_ROUND_TRIP = "Plan 12 tours,\n\tit's  naïve — 北京 😀 {x} 3.5%"


class Tokenizer:
    """A tokenizer with what the models need of it; made by `from_path`.

    Attributes:
        pad_id: the id that fills batches; positions that hold it are masked, so any valid id serves.
        vocab_size: number of ids, added tokens included; embeddings of a model may have more rows.
        max_token_chars: length of the longest token, in characters; a text of n characters has at least
            n / max_token_chars tokens, which lets a reader stop early on a huge text.
    """

    def __init__(self, spec: dict[str, Any], config: dict[str, Any]):
        """Args: spec: the content of a `tokenizer.json`; config: the content of a `tokenizer_config.json`."""
        spec = dict(spec, truncation=None, padding=None)
        self._spec = spec
        self._config = config
        self._full = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(dict(spec, added_tokens=[])))
        self.vocab_size = self._full.get_vocab_size(with_added_tokens=True)
        self.max_token_chars = max(len(token) for token in self._full.get_vocab())
        self.pad_id = self._find_pad_id()

    @classmethod
    def from_path(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a folder with `tokenizer.json`, or a `.gguf` file.

        Raises:
            InputError: nothing of the kind is there, it is broken, or the GGUF's tokenizer is of an unknown
            kind.
        """
        path = Path(path)
        if path.suffix == ".gguf" and path.is_file():
            return _from_gguf(path)
        file = path / _TOKENIZER_FILE
        if not file.is_file():
            raise InputError(
                f"no tokenizer in {path}: give a folder that holds {_TOKENIZER_FILE} (save it from "
                "transformers with a fast tokenizer), or a .gguf file"
            )
        spec = read_object(file)
        config = read_object(path / _CONFIG_FILE) if (path / _CONFIG_FILE).is_file() else {}
        try:
            return cls(spec, config)
        except Exception as error:  # tokenizers raises bare Exception for a spec it cannot use
            raise InputError(f"{file} is not a tokenizer that `tokenizers` can load: {error}") from error

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Token ids of untrusted texts, in parallel over the texts.

        A byte that the vocabulary lacks leaves nothing behind, as in the published tokenizer (SmolLM2: six
        control characters and unassigned planes of Unicode).

        Args:
            texts: any text; what looks like a special token is spelled out in ordinary tokens.
            special: add what the tokenizer puts around a text for its model (BERT: `[CLS] … [SEP]`;
                a decoder such as SmolLM2: nothing).
        """
        encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=special)
        return [encoding.ids for encoding in encoded]

    def encode_template(self, text: str) -> list[int]:
        """Token ids of trusted text: special tokens written in it become those tokens; nothing is added."""
        return self._full.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int], *, special: bool = True) -> str:
        """The text of token ids; with `special=False` special tokens are left out."""
        return self._full.decode(list(tokens), skip_special_tokens=not special)

    def token_id(self, text: str) -> int:
        """The id of a text that is exactly one token (a label such as "3", or a special token).

        Raises:
            InputError: the text is no token of its own, with the tokens it would take.
        """
        ids = self.encode_template(text)
        if len(ids) != 1:
            pieces = [self._full.id_to_token(token) for token in ids]
            raise InputError(f"{text!r} is not one token of this tokenizer but {len(ids)}: {pieces}")
        return ids[0]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, loadable here and by `transformers`.

        Args:
            directory: made when absent; the two files in it are replaced.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in ((_TOKENIZER_FILE, self._spec), (_CONFIG_FILE, self._config)):
            partial = directory / f".{name}.partial"
            partial.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
            os.replace(partial, directory / name)

    def _find_pad_id(self) -> int:
        for key in ("pad_token", "eos_token", "unk_token"):
            token = self._config.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and (token_id := self._full.token_to_id(token)) is not None:
                return token_id
        return 0


def _from_gguf(path: Path) -> Tokenizer:
    try:
        with path.open("rb") as file:
            fields = _read_gguf_metadata(file)
    except (OSError, ValueError, KeyError, OverflowError, MemoryError, struct.error) as error:
        raise InputError(f"{path} is not a whole GGUF file: {error}") from error

    def read(key: str) -> Any:
        return fields.get(f"tokenizer.ggml.{key}")

    kind, rule = read("model"), read("pre")
    if kind != "gpt2" or rule not in _PRE_TOKENIZERS:
        raise InputError(
            f"{path}: tokenizer kind {kind!r} with pre-tokenizer {rule!r} is not known here (known: 'gpt2' "
            f"with {sorted(_PRE_TOKENIZERS)}); use the Hugging Face folder of this model instead"
        )
    tokens, types, merges = read("tokens"), read("token_type"), read("merges")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": token, **flags, "special": kind == _GGUF_CONTROL}
            for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (_GGUF_CONTROL, _GGUF_USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[rule],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in _GGUF_KEYS.items():
        if (index := read(f"{key}_token_id")) is not None:
            config[name] = tokens[index]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    tokenizer = Tokenizer(spec, config)
    if tokenizer.decode(tokenizer.encode_batch([_ROUND_TRIP])[0]) != _ROUND_TRIP:
        raise InputError(f"the tokenizer in {path} does not give a text back after encode and decode")
    return tokenizer


def _read_gguf_metadata(file: BinaryIO) -> dict[str, Any]:
    """The key-value part of a little-endian GGUF file, versions 2 and 3.

    The package gguf wraps each of the 98,000 strings in three arrays and takes seconds for what takes 0.2 s here.
    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """

    def read(code: str) -> Any:
        return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]

    def read_text() -> str:
        return file.read(read("Q")).decode("utf-8")

    def read_value(kind: int) -> Any:
        if kind == _GGUF_STRING:
            return read_text()
        if kind != _GGUF_ARRAY:
            return read(_GGUF_SCALARS[kind])
        kind, length = read("I"), read("Q")
        if kind in (_GGUF_STRING, _GGUF_ARRAY):
            return [read_value(kind) for _ in range(length)]
        code = f"<{length}{_GGUF_SCALARS[kind]}"
        return list(struct.unpack(code, file.read(struct.calcsize(code))))

    magic, version = file.read(4), read("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it starts with {magic!r}, version {version}")
    read("Q")  # number of tensors
    return {read_text(): read_value(read("I")) for _ in range(read("Q"))}
