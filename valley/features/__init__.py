"""Tokens of the frozen tower, computed once and read by every run on the same files."""
