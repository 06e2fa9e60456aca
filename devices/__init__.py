"""Devices: how to reach them, what runs on them, and what is measured there.

Nothing here knows the exporter: this package knows commands, files and seconds.
"""
