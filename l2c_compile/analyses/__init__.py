"""What can be learned from a graph by reading it; nothing here edits one."""
