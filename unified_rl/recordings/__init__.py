"""Data sets of robots: files of others as rows of a replay, what they hold, whether they fit, and sets of one's own."""

from unified_rl.recordings.checking import Finding, check_data
from unified_rl.recordings.importing import FORMATS, import_data
from unified_rl.recordings.making import KINDS, make_data
from unified_rl.recordings.showing import describe_data

__all__ = ["FORMATS", "KINDS", "Finding", "check_data", "describe_data", "import_data", "make_data"]
