"""Valid files of every kind that the package reads, and the ways to break them, one layer of a file each."""
