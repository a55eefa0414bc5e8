"""Random programs that do what Python allows: state, hooks, caches, exceptions, and changes between calls."""
