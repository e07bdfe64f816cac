"""unified-rl: one off-policy correction and one replay for language models and robots."""

__version__ = "0.1.0"
