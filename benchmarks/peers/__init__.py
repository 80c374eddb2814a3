"""Other simulators on the same workloads, written as their users write them."""
