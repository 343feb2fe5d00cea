"""Many machines through Ray: batches, trainings and serving; Ray is imported inside functions only."""
