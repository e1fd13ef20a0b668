"""Memory of a GPU: measured by phase, held to limits, capped to a smaller card, forecast."""
