"""Endpoints of the Ollama protocol."""
