"""The kinds of ``kdlib trajectories`` and what they share."""
