"""`metala-vision visualize`: what a model looks at and how long it remembers, as pictures."""
