"""Tasks: from files on disk to Examples, with the settings (prompts, metric, stops) each is evaluated by."""
