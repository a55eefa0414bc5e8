"""The bench harness: ``python -m bench NAME``. To add a case, read ``cases.py``."""
