"""What the ranks of a run must agree on."""

import torch
import torch.distributed as dist


class PassCounts:
    """Tells every rank how many passes the busiest one makes, since a sharded model's ranks can only run together.

    The ranks talk by gloo, from CPU to CPU, so that no accelerator is waited for.

    Args:
        differ: whether ranks may have different numbers of passes; they do not talk where they may not.
    """

    def __init__(self, differ: bool) -> None:
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if together and differ else None

    def fillers(self, passes: int) -> int:
        """How many passes without use this rank must add to the ones that it makes now; every rank must ask."""
        if self._group is None:
            return 0
        most = torch.tensor(passes)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._group)
        return int(most) - passes
