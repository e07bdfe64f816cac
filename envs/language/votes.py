"""What an answer says, in one text for answers that say the same: the ballots of a majority vote."""

from __future__ import annotations

from unified_rl.envs.language.answers import marked_answer, spoken_formula, spoken_number
from unified_rl.envs.language.numbers import plain_text, read_number


def ballot(text: str, verifier: str) -> str | None:
    """What ``text`` gives as its answer; None where it gives none.

    Numbers are exact: ``0.5``, ``1/2`` and ``50/100`` are one answer. Free form is compared as plain text, so two
    spellings of one formula are two answers.

    Args:
        text: the answer.
        verifier: ``numeric`` (marked answers alone), ``last`` or ``math`` (as those read unmarked text).
    """
    said = marked_answer(text)
    if said is None and verifier == "math":
        said = spoken_formula(text)
    if said is not None:
        number = read_number(said)
        if number is not None and number.value is not None:
            return str(number.value)
        return (" ".join(plain_text(said).split()).rstrip(".") or None) if verifier == "math" else None
    if verifier == "numeric":
        return None
    spoken = spoken_number(text)
    return None if spoken is None or spoken.value is None else str(spoken.value)
