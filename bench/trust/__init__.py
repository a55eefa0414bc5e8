"""Benches about correctness: exit with 1 when something is wrong."""
