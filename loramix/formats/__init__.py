"""Readers and validators of untrusted files: GGUF, safetensors, text; nothing here loads native code."""
