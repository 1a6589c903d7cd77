"""Benchmarks of the operators: ``python -m benchmarks.bench_<op>``."""
