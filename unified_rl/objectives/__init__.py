"""Losses as lists of terms over one forward pass."""

from unified_rl.objectives.value import value_loss

__all__ = ["value_loss"]
