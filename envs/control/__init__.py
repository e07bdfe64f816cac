"""Control environments: batched MuJoCo, the two-route task, any Gymnasium id."""
