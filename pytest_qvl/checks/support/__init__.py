"""Helpers that several checks share; none of them imports a check."""
