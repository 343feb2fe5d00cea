"""Packs: a manifest, adapters and a gate in one directory; how they are read, changed and copied."""
