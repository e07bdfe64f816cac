"""Penalties beside the policy term, and which units they are about."""
