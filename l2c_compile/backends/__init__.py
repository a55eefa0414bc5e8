"""From a loop graph to a callable."""
