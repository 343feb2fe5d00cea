"""Running a pack: routing, decoding, streaming, batches."""
