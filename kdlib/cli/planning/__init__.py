"""What a run will take, found before it starts: memory, disk, steps and time."""
