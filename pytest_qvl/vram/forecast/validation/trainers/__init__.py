"""Forecasts of real trainers: the cases, what was predicted, what a GPU measured, and the table of both."""
