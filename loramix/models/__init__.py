"""Pure maths and lookup: gate, mixing, base models by name."""
