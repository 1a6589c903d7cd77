"""What saved edits survive: kills, torn and damaged files, several processes, threads, and large numbers."""
