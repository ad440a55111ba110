"""Benchmarks: one runner, one table of results, figures drawn from the table."""
