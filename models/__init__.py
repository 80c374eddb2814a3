"""Loading, adapters, exchange, tasks, metrics, the local training loop."""
