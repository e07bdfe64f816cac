"""Two rewards in TRL's signature; docs/rewards.md says how a run uses them (--allow my_rewards)."""

import re


def accuracy(completions, answer, **columns):
    """1 where the answer's last number is the one in the record's column `answer`."""
    said = [re.findall(r"-?[0-9]+", text) for text in completions]
    return [float(bool(numbers) and numbers[-1] == right) for numbers, right in zip(said, answer, strict=True)]


async def short(completion_ids, truncated):
    """A tenth of a point for a short answer; no opinion on one that was cut."""
    return [None if cut else 0.1 * (len(ids) < 8) for ids, cut in zip(completion_ids, truncated, strict=True)]
