"""Whole runs under one name: build everything from a configuration, train, resume, evaluate, record."""

from unified_rl.training.build import NODES, Job, with_steps
from unified_rl.training.dataset import record_dataset
from unified_rl.training.evaluating import evaluate_run, evaluated
from unified_rl.training.provenance import PACKAGES, read_config, run_folder, stored_config
from unified_rl.training.verbs import load_policy, restored, resume, train

__all__ = [
    "NODES",
    "PACKAGES",
    "Job",
    "evaluate_run",
    "evaluated",
    "load_policy",
    "read_config",
    "record_dataset",
    "restored",
    "resume",
    "run_folder",
    "stored_config",
    "train",
    "with_steps",
]
