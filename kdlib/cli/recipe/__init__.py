"""What ``kdlib run`` does with a recipe: reading, checking, wiring and running its stages, and their report."""
