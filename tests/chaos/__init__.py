"""Chaos: real processes are killed, cut off and starved of disk, and every run ends the same."""
