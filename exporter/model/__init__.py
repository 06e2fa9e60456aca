"""The model: its architecture, the one walk through its decoder, its checkpoint on disk."""
