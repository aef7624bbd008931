"""Benchmarks: commands that measure and print a table; none of them writes a file."""
