"""l2c_compile: compile the sampling loop of a diffusion model, caches included, into one static graph."""
