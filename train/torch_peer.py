"""The same training steps in torch, as its users write them: to compare speed with, nothing else.

Networks of `transformers` (SDPA attention) on rows padded to the longest of a batch, fused AdamW, float32 masters; bf16
by autocast. Losses are written out again here, so that equal first losses say that both compute the same.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn import functional

from jaxsearch.encoder import EncoderLoss
from jaxsearch.ranker import RankerLoss

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
Padded = tuple[np.ndarray, np.ndarray]


class TorchStep:
    """A model and its AdamW; `take` is one step, its loss returned."""

    def __init__(self, folder: Path, *, dtype: str, learning_rate: float, clip_norm: float, frozen: str = ""):
        self.model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for name, param in self.model.named_parameters():
            param.requires_grad_(not (frozen and frozen in name))
        self.params = [param for param in self.model.parameters() if param.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=learning_rate, weight_decay=0.0, fused=True)
        self.dtype, self.clip_norm = dtype, clip_norm

    def hidden(self, padded: Padded) -> torch.Tensor:
        tokens, where = (torch.from_numpy(array) for array in padded)
        inputs = {"input_ids": tokens.long(), "attention_mask": where.long()}
        return self.model(**inputs, use_cache=False).last_hidden_state

    def take(self, loss) -> float:
        """`loss(self)` gives the scalar to reduce."""
        cast = torch.autocast("cpu", torch.bfloat16) if self.dtype == "bfloat16" else contextlib.nullcontext()
        with cast:
            value = loss(self)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.params, self.clip_norm)
        self.optimizer.step()
        return float(value.detach())


def ranker_loss(config: RankerLoss, pairs: Padded, gold: np.ndarray, label_ids: tuple[int, int]):
    """Gold and list-wise terms (no teacher); pairs are rows of whole prompts, query by query as in `gold` [q c]."""
    targets = torch.from_numpy(gold)
    gains = torch.exp(targets / config.list_temperature)
    last = torch.from_numpy(pairs[1].sum(axis=1) - 1)

    def loss(step: TorchStep) -> torch.Tensor:
        hidden = step.hidden(pairs)
        answers = hidden[torch.arange(len(last)), last]
        rows = step.model.get_input_embeddings().weight[list(label_ids)]
        yes_no = (answers @ rows.to(answers.dtype).T).float()
        logits = (yes_no[:, 0] - yes_no[:, 1]).reshape(targets.shape)
        pointwise = functional.binary_cross_entropy_with_logits(logits, targets)
        shares = gains / gains.sum(dim=1, keepdim=True)
        listwise = -(shares * torch.log_softmax(logits, dim=1)).sum(dim=1).mean()
        return config.gold_weight * pointwise + config.list_weight * listwise

    return loss


def encoder_loss(config: EncoderLoss, queries: Padded, documents: Padded, allowed: np.ndarray):
    """InfoNCE and margin; documents query by query, the positive first."""
    keep = torch.from_numpy(allowed)
    num_queries = len(allowed)
    per_query = allowed.shape[1] // num_queries
    first = torch.arange(num_queries) * per_query

    def embed(step: TorchStep, padded: Padded) -> torch.Tensor:
        hidden, kept = step.hidden(padded).float(), torch.from_numpy(padded[1]).float()
        mean = (hidden * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True)
        return functional.normalize(mean, dim=1)

    def loss(step: TorchStep) -> torch.Tensor:
        vectors, flat = embed(step, queries), embed(step, documents)
        with torch.autocast("cpu", enabled=False):
            scores = vectors @ flat.T
        logits = (scores / config.temperature).masked_fill(~keep, -1e30)
        contrastive = functional.cross_entropy(logits, first)
        own = torch.stack([scores[i, i * per_query : (i + 1) * per_query] for i in range(num_queries)])
        margins = functional.relu(config.margin - own[:, :1] + own[:, 1:]).mean()
        return contrastive + config.margin_weight * margins

    return loss
