"""What an export leaves on disk: one folder for each artifact, and the bundle that holds them."""
