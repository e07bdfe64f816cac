"""The kernels, by what they look at: a unit, the whole batch, a group."""
