"""The one off-policy correction: levels, kernels, mismatch weights, rejection, reduction, diagnostics."""
