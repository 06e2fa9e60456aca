"""Profiling on devices: connections to them, the programs that run there, and the measurements.

Nothing here imports the exporter: this package deals with commands, files and seconds.
"""
