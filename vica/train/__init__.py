"""Training of both stages, from flags to the saved model."""
