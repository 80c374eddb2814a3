"""A site's records: readers, cleaning, grouped splits. Imports nothing of ours but core."""
