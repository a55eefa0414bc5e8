"""Define what a graph is: its kinds, marks, nodes, forms, storages and facts."""
