"""Make a loop graph of a denoiser and a loop."""
