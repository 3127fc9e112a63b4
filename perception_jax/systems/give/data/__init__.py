"""From what records say to batches of class groups."""
