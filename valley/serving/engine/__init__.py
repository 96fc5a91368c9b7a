"""Many answers at once from one language model: what an engine is, and the one that batches continuously."""
