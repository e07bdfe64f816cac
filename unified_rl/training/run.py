"""Whole runs under one name: build everything from a configuration, train, resume, evaluate, record."""

from unified_rl.training.build import NODES, Job
from unified_rl.training.dataset import record_dataset
from unified_rl.training.provenance import PACKAGES, read_config, run_folder
from unified_rl.training.verbs import evaluate_run, load_policy, resume, train

__all__ = [
    "NODES",
    "PACKAGES",
    "Job",
    "evaluate_run",
    "load_policy",
    "read_config",
    "record_dataset",
    "resume",
    "run_folder",
    "train",
]
