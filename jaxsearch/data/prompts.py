"""From a template file and texts to the token ids that judge and ranker read.

A template has two parts. The shared part is computed once and serves many items (the judge: its policy; the
ranker: its query); the item part follows it once per document. Each part is tokenised apart from the other,
so that an item scored behind a shared prefix has exactly the tokens it would have alone. What a document
looks like as text is in `verticals`; the read-out at the last position is the model's.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.errors import InputError

SLOTS = ("policy", "query", "document")
_SEPARATOR = "---"
_SLOT = re.compile(r"\{([a-z_]+)\}")


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """A parsed template; made by `from_text`, which checks it.

    Attributes:
        text: the file as it was.
        shared: its part before the line `---`, line break included.
        item: its part after that line.
    """

    text: str
    shared: str
    item: str

    @classmethod
    def from_text(cls, text: str) -> "PromptTemplate":
        """Parses a template: text with special tokens and the slots `{policy}`, `{query}`, `{document}`.

        Every character counts, line breaks too, but for the line `---` between the two parts. A space right
        before a slot is tokenised with what fills the slot.

        Raises:
            InputError: no separator or two, an unknown slot, a slot twice, `{document}` not in the item part
            or with
                nothing after it (there must be a last position that does not depend on truncation), no
                `{query}`.
        """
        text = text.replace("\r\n", "\n")
        parts = re.split(rf"^{_SEPARATOR}\n", text, flags=re.MULTILINE)
        if len(parts) != 2:
            raise InputError(
                f"a prompt template needs one line {_SEPARATOR!r} between the shared part and the item part; "
                f"this one has {len(parts) - 1}"
            )
        shared, item = parts
        slots = _SLOT.findall(text)
        for slot in slots:
            if slot not in SLOTS:
                raise InputError(
                    f"unknown slot {{{slot}}} in a prompt template; there are {', '.join(SLOTS)}"
                )
            if slots.count(slot) > 1:
                raise InputError(f"slot {{{slot}}} occurs twice in a prompt template; once is the rule")
        if "query" not in slots:
            raise InputError("a prompt template needs the slot {query}")
        if not item.partition("{document}")[2].strip():
            raise InputError(
                "the item part of a prompt template needs the slot {document} and text after it, up to "
                "where the model answers"
            )
        return cls(text, shared, item)

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedItem:
    """Tokens of one item; `truncated` says that its document was cut to fit."""

    tokens: list[int]
    truncated: bool


@dataclasses.dataclass(frozen=True, slots=True)
class PromptTokens:
    """A whole prompt: the shared prefix, and per item its tokens and whether its document was cut."""

    prefix: tuple[int, ...]
    items: list[list[int]]
    truncated: list[bool]


@dataclasses.dataclass(frozen=True, slots=True)
class _Slot:
    name: str
    lead: str


_Piece = list[int] | _Slot


class PromptEncoder:
    """Fills a template and tokenises it, within limits.

    Only a document is ever cut, from its end; all that the template says around it stays. Slots are filled as
    plain text: "<|im_end|>" in a document is nine ordinary tokens, never the end of a turn.
    """

    def __init__(
        self, template: PromptTemplate, tokenizer: Tokenizer, *, max_shared_tokens: int, max_item_tokens: int
    ):
        """Args: template; tokenizer; the most tokens that the shared part and one item may take.

        Raises:
            InputError: the text around the slots alone is longer than a limit allows.
        """
        self.template = template
        self.tokenizer = tokenizer
        self.max_shared_tokens = max_shared_tokens
        self.max_item_tokens = max_item_tokens
        self._shared = self._pieces(template.shared)
        self._item = self._pieces(template.item)
        limits = ((self._shared, max_shared_tokens, "shared"), (self._item, max_item_tokens, "item"))
        for pieces, limit, part in limits:
            size = sum(len(piece) for piece in pieces if isinstance(piece, list))
            if size + (part == "item") > limit:
                raise InputError(
                    f"the {part} part of the prompt template takes {size} tokens before its slots are "
                    f"filled, but max_{part}_tokens is {limit}: raise the limit or shorten the template"
                )

    @classmethod
    def from_card(cls, card: Mapping[str, Any], tokenizer: Tokenizer) -> "PromptEncoder":
        """From the entries that `card` gave to a model's card."""
        return cls(
            PromptTemplate.from_text(card["prompt_text"]),
            tokenizer,
            max_shared_tokens=card["max_shared_tokens"],
            max_item_tokens=card["max_item_tokens"],
        )

    def card(self) -> dict[str, Any]:
        """What a model's card says of its prompt: JSON values that `from_card` reads."""
        return {
            "prompt_text": self.template.text,
            "max_shared_tokens": self.max_shared_tokens,
            "max_item_tokens": self.max_item_tokens,
        }

    def encode_shared(self, **slots: str) -> list[int]:
        """Tokens of the shared part.

        Args:
            slots: the text of every slot that the shared part has; others are not looked at.

        Raises:
            InputError: a slot is missing, or the tokens are more than `max_shared_tokens`.
        """
        pieces = [piece for piece in self._shared if isinstance(piece, _Slot)]
        texts = {piece.name: self._slot_text(piece, slots) for piece in pieces}
        filled = dict(zip(texts, self.tokenizer.encode_batch(list(texts.values())), strict=True))
        tokens = self._fill(self._shared, filled)
        if len(tokens) > self.max_shared_tokens:
            sizes = ", ".join(f"{name} {len(ids)}" for name, ids in filled.items())
            raise InputError(
                f"the shared part of the prompt takes {len(tokens)} tokens ({sizes}), but at most "
                f"{self.max_shared_tokens} are allowed: shorten the {' or the '.join(filled)}"
            )
        return tokens

    def encode_items(self, items: Sequence[Mapping[str, str]]) -> list[EncodedItem]:
        """Tokens of many items, each at most `max_item_tokens` long.

        Args:
            items: per item the text of every slot that the item part has.

        Raises:
            InputError: a slot is missing, or an item is too long even with nothing left of its document (its
            query).
        """
        slots = [piece for piece in self._item if isinstance(piece, _Slot)]
        wanted = [{slot.name: self._slot_text(slot, item) for slot in slots} for item in items]
        unique = list({text: None for texts in wanted for text in texts.values()})
        ids = dict(zip(unique, self.tokenizer.encode_batch(unique), strict=True))
        encoded = []
        for index, texts in enumerate(wanted):
            filled = {name: ids[text] for name, text in texts.items()}
            excess = sum(map(len, filled.values())) + self._item_size() - self.max_item_tokens
            if excess > 0:
                document = filled["document"]
                if excess >= len(document):
                    raise InputError(
                        f"item {index}: {len(filled.get('query', []))} tokens of query leave no room for its "
                        f"document within {self.max_item_tokens} tokens: shorten the query"
                    )
                filled["document"] = document[: len(document) - excess]
            encoded.append(EncodedItem(self._fill(self._item, filled), excess > 0))
        return encoded

    def encode(self, shared: Mapping[str, str], items: Sequence[Mapping[str, str]]) -> PromptTokens:
        """`encode_shared` and `encode_items` in one: what one scoring request needs."""
        encoded = self.encode_items(items)
        prefix = tuple(self.encode_shared(**shared))
        return PromptTokens(prefix, [item.tokens for item in encoded], [item.truncated for item in encoded])

    def _pieces(self, text: str) -> list[_Piece]:
        """Literal tokens and slots in turn; a space before a slot goes with the slot, as tokenizers like."""
        pieces: list[_Piece] = []
        parts = _SLOT.split(text)
        for index in range(0, len(parts), 2):
            is_last = index + 1 == len(parts)
            literal = parts[index] if is_last else parts[index].removesuffix(" ")
            pieces.append(self.tokenizer.encode_template(literal))
            if not is_last:
                pieces.append(_Slot(parts[index + 1], parts[index][len(literal) :]))
        return pieces

    def _slot_text(self, slot: _Slot, texts: Mapping[str, str]) -> str:
        if slot.name not in texts:
            raise InputError(f"the prompt needs a text for {{{slot.name}}}; given: {sorted(texts)}")
        text = texts[slot.name].strip()
        if slot.name == "document":
            # No token spells more than max_token_chars, so what is cut here would be cut below in any case.
            text = text[: (self.max_item_tokens + 1) * self.tokenizer.max_token_chars]
        return slot.lead + text

    def _item_size(self) -> int:
        return sum(len(piece) for piece in self._item if isinstance(piece, list))

    @staticmethod
    def _fill(pieces: Sequence[_Piece], filled: Mapping[str, list[int]]) -> list[int]:
        tokens: list[int] = []
        for piece in pieces:
            tokens.extend(filled[piece.name] if isinstance(piece, _Slot) else piece)
        return tokens
