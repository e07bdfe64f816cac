"""A language task of your own: a tiny model learns by reinforcement to sort letters, after a short imitation.

Run it with ``python examples/reasoner.py``; it takes a quarter of a minute on one core.
"""

from __future__ import annotations

from typing import Any

import torch

import unified_rl as ur
from unified_rl.envs.language import Segment, character_tokenizer


class SortLetters(ur.LanguageTask):
    """``dbca=`` is to be answered with ``abcd``; the reward is the share of letters in their place.

    Args:
        letters: in a prompt.
        seed: of the negative control of :class:`~unified_rl.envs.language.LanguageTask`.
    """

    def __init__(self, letters: int = 4, seed: int = 0) -> None:
        self.letters = letters
        tokenizer = character_tokenizer("abcdefgh=")
        super().__init__(tokenizer, max_prompt_length=letters + 1, max_turn_tokens=letters + 2, seed=seed)

    def _candidates(self, count: int, generator: torch.Generator) -> list[dict[str, Any]]:
        drawn = torch.randint(8, (count, self.letters), generator=generator).tolist()
        words = ["".join("abcdefgh"[i] for i in row) for row in drawn]
        return [{"text": f"{word}=", "answer": "".join(sorted(word))} for word in words]

    def _judge(self, problem: dict[str, Any], text: str, turn: int) -> ur.Verdict:
        answer = problem["answer"]
        hits = sum(said == right for said, right in zip(text, answer, strict=False))
        share = hits / max(len(answer), len(text))
        return ur.Verdict(reward=share, correct=text == answer)

    def _demonstrate(self, problem: dict[str, Any], style: str | None) -> list[Segment]:
        return [Segment(problem["answer"], trained=True, end=True)]


def main(steps: int = 5_120, imitation: int = 20) -> tuple[float, float]:
    """The mean held-out reward after imitation, and after reinforcement learning."""
    run = ur.assemble(
        SortLetters(),
        "causal_lm_tiny",
        correction="dapo",
        agent={"lr": 1e-3},
        rollout={"prompts": 16, "group_size": 8},
        warm_start={"name": "demonstrations", "dataset": None, "stages": [{"updates": imitation, "lr": 1e-3}]},
        steps=steps,
        seed=1,
        eval_every=0,
    )
    rows = run.run()
    before, after = rows[0]["eval/score"], rows[-1]["eval/score"]
    print(f"mean reward {before:.3f} after imitation, {after:.3f} after {run.steps} conversations")
    return before, after


if __name__ == "__main__":
    main()
