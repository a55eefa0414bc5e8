"""Make a callable of a loop graph."""
