"""Write a loop graph as a file, and read it back."""
