"""The parts of ``kdlib generate``: sources of prompts, the loop, verification, statistics and report."""
