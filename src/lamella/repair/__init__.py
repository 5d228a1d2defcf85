"""Methods that edit the weights of a trained model."""
