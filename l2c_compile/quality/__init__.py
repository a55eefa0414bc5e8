"""Measures of how good samples are, and the judge that compares them."""
