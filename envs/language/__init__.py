"""Language environments: token tasks, verifiers, multi-turn tasks, data files."""
