"""The main job: from a model to a smaller, measured, exported one, with its evidence."""
