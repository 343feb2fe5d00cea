"""Conversion of adapters, gates and bases between training, serving and other programs."""
