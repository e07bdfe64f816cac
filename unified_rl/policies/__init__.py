"""Policies and critics of every class; anything with sample, log_prob and nll."""
