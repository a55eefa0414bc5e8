"""Random denoisers, loops and schedules drawn from a seed, and what must hold of them once they are compiled."""
