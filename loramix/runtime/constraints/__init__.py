"""Constrained decoding: GBNF grammars and JSON schemas."""
