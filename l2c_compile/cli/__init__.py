"""The command ``l2c``, one file a command."""
