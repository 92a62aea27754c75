"""What the machine needs: processes, random state, compiled graphs, files on disk."""
