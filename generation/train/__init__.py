"""Training the systems of the papers, and models of one's own."""
