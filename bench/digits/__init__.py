"""The trained digits model: how it was made, and how well every finder does on it."""
