"""Studies of what layers do."""
