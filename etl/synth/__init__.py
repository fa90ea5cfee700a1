"""Synthetic clicks of any size with a known signal."""
