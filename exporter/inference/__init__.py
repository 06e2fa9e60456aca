"""Models that run: the torch reference, whatever else can be opened, and text from each."""
