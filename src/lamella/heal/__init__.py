"""Methods that train a model back, or on."""
