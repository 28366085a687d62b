"""A pruned decoder in `transformers`: an ordinary smaller model with the same logits."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from pairs import TOLERANCE, make_pair, make_tokens, relative_error

from jaxsearch.nn.convert import save_pretrained
from jaxsearch.nn.pruning import PackedTokens, Widths, collect_moments, keep_layers, prune_widths


@pytest.mark.parametrize("widths", [Widths(20, num_heads=2), Widths(20, num_kv_heads=1)], ids=str)
@pytest.mark.parametrize("case", ["llama everything", "qwen2 gqa tied", "qwen3"])
def test_logits(tmp_path, case, widths):
    whole = make_pair(case, tmp_path / "in").ours
    tokens, where = make_tokens(whole.config.vocab_size)
    random = np.random.default_rng(0).integers(1, whole.config.vocab_size, (16, 40)).astype(np.int32)
    everything = PackedTokens(random, np.ones_like(random), np.ones(random.shape, bool))
    pruned, _ = prune_widths(whole, collect_moments(whole, [everything]), widths)
    pruned = keep_layers(pruned, [1])
    save_pretrained(pruned, tmp_path / "out")
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert reference.config.num_hidden_layers == 1
    assert reference.config.intermediate_size == 20
    with torch.no_grad():
        expected = reference(torch.tensor(tokens), attention_mask=torch.tensor(where)).logits.numpy()
    found = pruned.logits(pruned(jnp.asarray(tokens), where=jnp.asarray(where)))
    error = relative_error(found, expected, where)
    print(f"MEASURED pruned {case} {widths}: {error:.1e}")
    assert error <= TOLERANCE  # max 2.5e-6
