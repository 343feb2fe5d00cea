"""Conversion between training and run time: validation, GGUF adapters, NumPy gates."""
