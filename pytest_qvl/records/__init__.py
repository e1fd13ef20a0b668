"""Records of runs, read: compared, shown as a page, explained. Knows no pytest and imports no torch.

Writing them is the affair of :mod:`pytest_qvl.report.record`.
"""
