"""Strictness for every test: shapes and dtypes are checked at each call, and nothing is promoted silently.

Tests see one CPU device: what needs eight starts `tests/eight_devices.py`, so that no other test pays for them.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import jaxtyping

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("jaxsearch", "beartype.beartype")
