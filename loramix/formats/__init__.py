"""Readers and validators of untrusted files (GGUF, safetensors, text) without native code."""
