"""Benchmarks that people compare by: questions as texts, free answers, each benchmark's scorer."""
