"""Tables of runs and of suites: which results stand in them, differences with their errors, and their texts."""
