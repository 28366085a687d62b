"""Scoring a query's documents in torch, as the users of `transformers` and `sentence-transformers` do it.

To compare speed with, nothing else. Weights are those of a folder that we saved; decoders run with SDPA attention and
their last logits only, sorted by length, in batches padded to their longest prompt.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
Labels = tuple[int, int]


def num_threads() -> int:
    return torch.get_num_threads()


class DecoderScorer:
    """`AutoModelForCausalLM` on whole prompts, given as tokens; a score is yes minus no at the last position."""

    def __init__(self, folder: Path, labels: Labels, *, dtype: str):
        kind = getattr(torch, dtype)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
        self.labels = list(labels)

    def __call__(self, prompts: Sequence[Sequence[int]], batch_size: int) -> Float[np.ndarray, "c"]:
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        scores = np.zeros(len(prompts), np.float32)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens = torch.zeros((len(rows), len(prompts[rows[0]])), dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(rows):  # on the left, so that all end at the last position
                tokens[row, tokens.shape[1] - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, tokens.shape[1] - len(prompts[i]) :] = 1
            places = (mask.cumsum(dim=1) - 1).clamp(min=0)
            with torch.inference_mode():
                given: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1, "position_ids": places}
                logits = self.model(input_ids=tokens, attention_mask=mask, **given).logits[:, -1]
            both = logits[:, self.labels].float().numpy()
            scores[rows] = both[:, 0] - both[:, 1]
        return scores


class CrossEncoderScorer:
    """`sentence_transformers.CrossEncoder` on texts; it reads the same two rows of the last logits."""

    def __init__(self, folder: Path, labels: Labels, *, dtype: str, batch_size: int, max_tokens: int):
        import sentence_transformers

        logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
        self.model = sentence_transformers.CrossEncoder(
            str(folder),
            max_length=max_tokens,
            device="cpu",
            activation_fn=torch.nn.Identity(),
            model_kwargs={"dtype": getattr(torch, dtype)},
        )
        read_out: Any = self.model[-1]
        read_out.true_token_id, read_out.false_token_id = labels
        self.model.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        self.batch_size = batch_size

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> Float[np.ndarray, "c"]:
        scores = self.model.predict(list(pairs), batch_size=self.batch_size, show_progress_bar=False)
        return np.asarray(scores, np.float32)
