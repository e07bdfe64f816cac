"""Own rows and stored ones in every batch, at a fixed share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from unified_rl.configurable import configurable
from unified_rl.errors import RecordError
from unified_rl.ranges import Count, UnitInterval, ranged
from unified_rl.replay.buffer import Replay
from unified_rl.replay.persist import read_rows


@configurable
@ranged("replay")
class WithDataset(Replay):
    """A replay each of whose batches holds a share of rows from a recorded data set, behind its own. RLPD, 2302.02948.

    Args:
        data: folder of recorded rows (``unified-rl evaluate RUN --record FOLDER``).
        share: of a batch.
        options: of :class:`Replay`.

    Raises:
        ConfigError: ``share`` outside [0, 1].
        CheckpointError: ``data`` is missing or damaged, or holds no rows.
    """

    def __init__(self, capacity: Count, *, data: str, share: UnitInterval = 0.5, **options: Any) -> None:
        super().__init__(capacity, **options)
        rows = read_rows(data, "replay.data")
        self.stored, self.share = rows.reshape(rows.numel()), share

    def sample(self, batch_size: int | None, *, keys: Any = None, **options: Any) -> TensorDict:
        """As :meth:`Replay.sample`, for single rows; stored ones have ``index`` -1.

        A draw of no given size joins its share to what one write brought.
        """
        if batch_size is None and self.share == 1.0:
            raise RecordError("replay.share=1.0 leaves no own rows, so a draw needs a number of rows")
        if batch_size is None:
            own: TensorDict | None = super().sample(None, keys=keys, **options)
            assert own is not None
            count = round(len(own) * self.share / (1.0 - self.share))
        else:
            count = round(self.share * batch_size)
            own = None
        at = torch.from_numpy(self._rng.integers(0, len(self.stored), count).astype(np.int64))
        if own is None and batch_size is not None and count < batch_size:
            own = super().sample(batch_size - count, keys=keys, **options)
        shown = self.stored.select(*(keys or self.stored.keys()))[at]
        shown["index"] = torch.full((count,), -1)
        return shown if own is None else torch.cat([own, shown.select(*own.keys())])
