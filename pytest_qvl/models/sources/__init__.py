"""Where models come from: released, embedded and synthetic weights, folders, hub ids, and their processors."""
