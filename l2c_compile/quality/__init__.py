"""How good samples are, and the judge that compares them."""
