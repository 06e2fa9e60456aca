"""Run models: the torch reference, loading models of every kind, and generating text."""
