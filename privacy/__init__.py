"""Sampler, clipper, noise, accountant, plan, ledger, egress, secure aggregation, audit."""
