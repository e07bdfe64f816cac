"""One backward scan for every value target, group baselines, off-policy evaluation."""
