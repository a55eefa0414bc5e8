"""Benches about time, memory and compilation."""
