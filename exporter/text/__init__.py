"""Read documents from files, turn text into tokens, and cut tokens into sequences."""
