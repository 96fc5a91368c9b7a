"""What a run leaves behind on disk, whole or not at all."""
