"""The HTML page of a run and its evaluations, and the plots in it."""
