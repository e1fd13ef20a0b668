"""The pytest side: one file is one plugin object, or one helper of them."""
