"""The one off-policy correction: levels, kernels, mismatch weights, rejection, reduction, diagnostics."""

from unified_rl.correction.correction import Correction, CorrectionOutput
from unified_rl.correction.diagnostics import effective_sample_size
from unified_rl.correction.internal.distributed import process_total
from unified_rl.correction.kernels import Kernel, Traits
from unified_rl.correction.presets import correction_names, load_correction, preset_config

__all__ = [
    "Correction",
    "CorrectionOutput",
    "Kernel",
    "Traits",
    "correction_names",
    "effective_sample_size",
    "load_correction",
    "preset_config",
    "process_total",
]
