"""One method per folder; none knows another."""
