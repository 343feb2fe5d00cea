"""llama.cpp's library, loaded once with the environment that it needs."""

from __future__ import annotations

import os

# OpenMP threads that spin for long starve each other when another program computes: eight tokens took
# 26 s beside a training run, 0.3 s with this, at no loss on an idle machine; it is read when the library loads
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import llama_cpp.llama_cpp as C

__all__ = ["C"]
