"""Many sites on one machine: engines, partitioners, scenarios, faults."""
