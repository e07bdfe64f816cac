"""Reading data files of problems: :mod:`unified_rl.records` and :mod:`unified_rl.prompts` under their earlier name."""

from __future__ import annotations

from unified_rl.prompts import field
from unified_rl.records import MAX_EXPONENT, open_records, read_records

__all__ = ["MAX_EXPONENT", "field", "open_records", "read_records"]
