"""Token by token and layer by layer: what ran while a model answered a prompt."""
