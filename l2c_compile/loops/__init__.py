"""Filled by the sibling modules."""
