"""Schedules: which evaluation reuses which site, and how. Nothing here knows of graphs."""
