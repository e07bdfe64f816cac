"""Where experience comes from: batched control rollouts and language-model rollouts."""
