"""Loads llama.cpp's library with the environment variables that it needs."""

from __future__ import annotations

import os

# spinning OpenMP threads starve each other on a busy machine: eight tokens took 26 s during a training run, 0.3 s
# with this, without a loss on an idle machine; the library reads it when it loads
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import llama_cpp.llama_cpp as C

__all__ = ["C"]
