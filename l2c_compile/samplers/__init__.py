"""What users hold: a compiled sampler, and one from a file."""
