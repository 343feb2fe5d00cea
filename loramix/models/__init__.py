"""Gate, mixes and bases: pure computation and lookup."""
