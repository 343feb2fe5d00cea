"""Everyday requests to all skills, in words that no training row has, scored automatically."""
