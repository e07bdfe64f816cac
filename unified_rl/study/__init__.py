"""Studies: grids of runs, their statistics and the report."""
