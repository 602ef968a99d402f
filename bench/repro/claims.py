"""To be replaced below."""
