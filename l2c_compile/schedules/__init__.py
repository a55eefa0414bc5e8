"""Which evaluation reuses what, and how; no graph is known here."""
