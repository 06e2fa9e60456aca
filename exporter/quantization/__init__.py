"""Integers and scales: how weights become codes, and how codes lie on disk."""
