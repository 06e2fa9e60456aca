"""Measure the quality of a model, and the agreement of two models."""
