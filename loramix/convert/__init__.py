"""Adapters, gates and bases between training, run time and other programs."""
