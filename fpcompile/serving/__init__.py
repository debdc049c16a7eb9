"""Serving and its measurements: the server, the load generator, and the benchmarks of goodput."""
