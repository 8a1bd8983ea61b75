"""Measurements, each beside its peer and its physical limit in one run. Never part of the tests: machines are noisy."""
