"""Methods that run less of the model."""
