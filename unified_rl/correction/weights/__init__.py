"""What multiplies or removes units beside the kernel: mismatch weights, rejection, thinning."""
