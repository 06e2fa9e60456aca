"""How close two models are, and how good one is."""
