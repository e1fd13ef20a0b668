"""Mutation testing of the checks: small random defects in tensors, settings and code.

The catalogue holds faults that somebody thought of. Here nobody chooses: what is drawn from a seed is made on the live
model, and it is caught, equivalent, or missed.
"""
