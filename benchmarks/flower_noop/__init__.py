"""A Flower app that trains nothing, for comparison."""
