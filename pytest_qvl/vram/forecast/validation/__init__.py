"""Forecasts against what was measured, and against other estimates."""
