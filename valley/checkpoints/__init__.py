"""Checkpoints on disk: written so that a half-written one is never taken for whole."""
