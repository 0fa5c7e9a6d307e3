"""The `vica` program: one file a verb."""
