"""A suite's report: one HTML page with figures, losses, costs and sample answers."""
