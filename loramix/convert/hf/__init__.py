"""Conversion of Hugging Face checkpoints to GGUF bases: settings, vocabulary, chat template and tensors."""
