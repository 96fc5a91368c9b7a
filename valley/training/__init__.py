"""A training stage in one process: what trains, the loop, the engines behind it, and the record kept of it."""
