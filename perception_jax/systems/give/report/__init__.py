"""The report of a GiVE run."""
