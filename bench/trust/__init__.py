"""Benches that look for what is wrong: each must find nothing."""
