"""Defaults and bounds that several parts share.

Imports nothing of the package and no NumPy: the CLI, the memory plan and the server read these without loading
the code that they belong to.
"""

from __future__ import annotations

from typing import Literal, get_args

__version__ = "0.1.0"

DEFAULT_PACK = "smollm2-135m"
"""Name of the default base, and of the pack on it that ships with Loramix."""

Policy = Literal["top1", "blend", "each", "token", "base"]
"""How the gate's probabilities become a mix; see `loramix.models.mixing`."""
POLICIES: tuple[Policy, ...] = get_args(Policy)
DEFAULT_POLICY: Policy = "each"
BASE = "base"
"""What a mix without any skill is called."""

N_CTX = 2048
"""Tokens of a context, prompt and answer together."""
MIN_CTX = 64
MAX_TOKENS = 256
"""Longest answer in tokens where neither the request nor the skill says."""
N_BATCH = 256
"""Tokens of a prompt that are read at once: 2 % slower than 512 on longer prompts, half the memory."""

CONTEXTS = 3
"""Mixes whose KV an engine keeps, the bare base's included; a conversation rarely moves between more."""
SERVER_CONTEXTS = 4
"""The same in the server, whose users ask for different skills at once."""
NATIVE_ADAPTERS = 8
"""Adapters that llama.cpp holds at once, mixes of several included."""
MIX_PARTS = 4
"""Skills whose halves are kept in memory, so that a new blend of them starts without their files."""
KV_STORE_BYTES = 64 * 2**20
"""KV that is kept of mixes which have lost their context."""

DEFAULT_QUANT = "Q4_K_M"
"""Taken where a repository of the hub has several, and for a base that is converted from a checkpoint."""
BASE_QUANTS = ("F32", "F16", "Q8_0", "Q4_0", DEFAULT_QUANT)
"""Types that a checkpoint's matrices can be converted to."""
EXPORT_QUANTS = ("Q8_0", "Q4_0", "Q4_1", "F16", "F32")
"""Types that a merged model can be written in."""

RANK = 16
"""Of an adapter where nothing else is said."""
MAX_RANK = 256
MAX_SKILLS = 256
"""Of a pack."""
