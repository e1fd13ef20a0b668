"""Each module of a model against its oracle, on the input that it really had."""
