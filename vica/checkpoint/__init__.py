"""Files of checkpoints in three formats: reading, writing, rewriting, merging adapters."""
