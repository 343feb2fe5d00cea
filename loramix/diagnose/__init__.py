"""What a machine has and what an engine will take of it."""
