"""Loss terms beside the policy gradient: value regression, finiteness guards, optimiser steps."""

from unified_rl.objectives.optimize import Optimizer, first_non_finite
from unified_rl.objectives.value import value_loss

__all__ = ["Optimizer", "first_non_finite", "value_loss"]
