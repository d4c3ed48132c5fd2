"""Before and around a run."""
