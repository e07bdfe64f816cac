"""What corrections are computed with: known gradients, sums over processes, hashed draws."""
