"""Makes training data."""
