"""Loss terms beside the policy gradient: value, imitation, entropy, divergence."""
