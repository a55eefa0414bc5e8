"""Files from strangers: read strictly and within bounds, written at once or not at all."""
