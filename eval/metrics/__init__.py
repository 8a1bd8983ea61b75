"""Metrics, each in one module and equal to its official code on the vectors in tests/vectors."""
