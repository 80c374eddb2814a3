"""Examples; a package, so that benchmarks run the same settings."""
