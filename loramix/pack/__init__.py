"""Packs: reading, changing and copying a directory with a manifest, adapters and a gate."""
