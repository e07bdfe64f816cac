"""Errors that are the user's to mend. Each message names the thing, where it is, and the fix."""


class UnifiedRLError(Exception):
    """Base class: the command line prints these without a traceback."""


class ConfigError(UnifiedRLError, ValueError):
    """A configuration that cannot be composed or built."""


class RecordError(UnifiedRLError, ValueError):
    """A batch of experience that breaks the record of :mod:`unified_rl.units`."""


class CheckpointError(UnifiedRLError, RuntimeError):
    """A run folder or checkpoint that is missing, damaged, in use or of another version."""


class DamageError(CheckpointError):
    """A file that is missing, or is not as it was written; the message names it."""


class NonFiniteError(UnifiedRLError, FloatingPointError):
    """A NaN or infinity in an observation, reward, loss or gradient."""


class RolloutError(UnifiedRLError, RuntimeError):
    """An environment, a reward or a row source raised; the message says what, where, and what is saved."""


class PeerError(UnifiedRLError, RuntimeError):
    """Another process of the same run ended, does not answer, or holds another state; the message says which."""


class RestoreError(CheckpointError):
    """An environment that cannot be put back to where it was; a run goes on with new episodes."""


class DataError(UnifiedRLError, ValueError):
    """A data file that cannot be read; the message names the file and the line."""


class EnvError(UnifiedRLError, RuntimeError):
    """An environment that raised, or returned what it cannot have meant; the message names it and the step."""
