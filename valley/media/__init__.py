"""Video and image files: what is in them, which times to look at, the frames at those times, the tower's transform."""
