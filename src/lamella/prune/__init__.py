"""Methods that cut the model."""
