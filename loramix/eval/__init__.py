"""Measuring a pack: answers that survive a kill, scores of skills and of the gate, the report."""
