"""The trainer loop, checkpoint and resume, evaluation, metrics, seeding."""
