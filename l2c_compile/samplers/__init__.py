"""The samplers that users call: a compiled one, and one from a file."""
