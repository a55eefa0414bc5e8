"""What can be read off a graph; nothing here edits one."""
