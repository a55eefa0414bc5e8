"""From a denoiser and a loop to a loop graph."""
