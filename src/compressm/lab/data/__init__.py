"""Data sets: downloaded, embedded or generated."""
