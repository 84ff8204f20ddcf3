"""Estimates memory, steps and disk space of a run before it starts (--dry-run)."""
