"""Deliberate faults: each a small, named defect from real threads, and the check that must catch it.

A validation suite is worth what it catches. Every fault is data (:class:`pytest_qvl.faults.catalogue.Fault`) and a
context manager that damages a healthy model, processor, batch, adapter or run and undoes it on leaving.
"""

from pytest_qvl.faults.case import Case, apply, healthy_case
from pytest_qvl.faults.catalogue import Fault, catalogue, find

__all__ = ["Case", "Fault", "apply", "catalogue", "find", "healthy_case"]
