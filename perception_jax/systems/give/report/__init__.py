"""What a person sees: the report, and a prediction's picture."""
