"""The bench harness, which ``python -m bench NAME`` starts. To add a case, read ``cases.py``."""
