"""What a run will take: memory, steps and disk, before it starts."""
