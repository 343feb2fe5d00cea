"""Shared defaults and bounds.

Imports no other module of the package and no NumPy, so that the CLI, the memory plan and the server can read them
without loading the runtime.
"""

from __future__ import annotations

from typing import Literal, get_args

__version__ = "0.1.0"

DEFAULT_PACK = "smollm2-135m"
"""Name of the default base, and of the pack on it that ships with Loramix."""

Policy = Literal["top1", "blend", "each", "token", "base"]
"""How a mix is chosen from the gate's probabilities; see `loramix.models.mixing`."""
POLICIES: tuple[Policy, ...] = get_args(Policy)
DEFAULT_POLICY: Policy = "each"
BASE = "base"
"""Name of the mix without skills."""

LLAMA_CPP = "llama-cpp-python==0.3.36"
"""The release that the runtime is written for: its ctypes structs and graphs change between releases."""

N_CTX = 2048
"""Tokens of a context, prompt and answer together."""
MIN_CTX = 64
MAX_TOKENS = 256
"""Maximum tokens of an answer if neither the request nor the skill sets a limit."""
N_BATCH = 256
"""Tokens per prefill batch: 2 % slower than 512 on long prompts, with half the memory."""

CONTEXTS = 3
"""Mixes whose KV an engine keeps, the bare base included; few conversations use more."""
SERVER_CONTEXTS = 4
"""The same for the server, whose users use different skills concurrently."""
NATIVE_ADAPTERS = 8
"""Adapters that llama.cpp holds at once, blends included."""
MIX_PARTS = 4
"""Skills whose matrices are cached, 1 to 4 MB each, so that a new blend does not read their files."""
KV_STORE_BYTES = 64 * 2**20
"""Maximum bytes of KV saved from evicted contexts."""

N_CELLS = 4096
"""KV cells that all concurrent answers of a server share."""
PARALLEL = 8
"""Maximum answers that a server or a batch decodes at once."""
QUEUE = 16
"""Maximum requests that wait at a server, not counting those at the worker."""
QUEUE_S: float = 60
"""Maximum seconds that a request waits."""
FIRST_TOKEN_S: float = 60
"""Maximum seconds until the first token of an answer."""
ANSWER_S: float = 300
"""Maximum seconds until the end of an answer."""

DEFAULT_QUANT = "Q4_K_M"
"""Default if a hub repository has several, and for bases converted from checkpoints."""
BASE_QUANTS = ("F32", "F16", "Q8_0", "Q4_0", DEFAULT_QUANT)
"""Types that a checkpoint's matrices can be converted to."""
EXPORT_QUANTS = ("Q8_0", "Q4_0", "Q4_1", "F16", "F32")
"""Types that a merged model can be written in."""

RANK = 16
"""Default rank of an adapter."""
MAX_RANK = 256
MAX_SKILLS = 256
"""Maximum skills of a pack."""
