"""Few-shot evaluation: tasks -> plan -> prompts -> answers -> scores. Imports data_pipelines and mm1, never ablations."""
