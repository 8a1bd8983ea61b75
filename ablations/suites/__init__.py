"""Suites: composed, matched, costed, run as processes, and what is known of every cell."""
