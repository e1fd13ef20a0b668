"""A forecast as text and as a figure."""
