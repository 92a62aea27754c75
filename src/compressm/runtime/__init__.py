"""Services of the platform: processes, random state, compiled graphs, files on disk."""
