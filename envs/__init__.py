"""Environments: control (MuJoCo, Gymnasium) and language (tokens, verifiers, turns)."""

if not __name__.startswith("unified_rl."):
    raise ImportError(f"import this package as unified_rl.{__name__}, not as {__name__}; run 'make install' first")
