"""Plans a run before it starts (--dry-run): whether it can, and what it needs."""
