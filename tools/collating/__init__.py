"""What ``tools/collators.py`` is made of: real collators of public frameworks, judged by ``checks.batch``."""
