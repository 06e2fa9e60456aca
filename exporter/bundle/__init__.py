"""The output of an export: a folder for each artifact, and the bundle that contains them."""
