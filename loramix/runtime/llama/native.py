"""Loads llama.cpp's library with the environment variables that it needs."""

from __future__ import annotations

from loramix.hardware import limit_spinning

limit_spinning()
import llama_cpp.llama_cpp as C  # noqa: E402  # reads the environment when it loads

__all__ = ["C"]
