"""Which variant is better, by how much, and how sure one can be: trials of whole trainings, and what comes of them."""
