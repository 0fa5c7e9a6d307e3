"""Small things that every other folder may use."""
