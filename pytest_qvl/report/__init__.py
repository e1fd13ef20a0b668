"""What was found out: on the terminal, in the record."""
