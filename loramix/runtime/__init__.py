"""The llama.cpp runtime: engine, router, sessions. Never imports torch."""
