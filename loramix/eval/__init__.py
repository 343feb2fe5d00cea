"""Measuring packs: skills, routing, composed requests."""
