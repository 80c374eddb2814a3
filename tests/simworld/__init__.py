"""Simworld: a whole federation in one process and one thread, whose every accident is a seed's."""
