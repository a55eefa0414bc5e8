"""Define what a graph is: its kinds, marks, nodes, forms and facts."""
