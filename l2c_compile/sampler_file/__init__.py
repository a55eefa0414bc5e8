"""A loop graph as a file, and back."""
