"""The gate: what was measured of a bundle, against a budget and against a baseline."""
