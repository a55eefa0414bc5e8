"""What Python holds beside tensors of a graph: snapshots of it, what changed since, and how it is put back."""
