"""The ``kdlib`` command."""
