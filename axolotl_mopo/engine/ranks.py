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

    def missing(self, *passes: int) -> list[int]:
        """How many passes of each kind this rank must add without use to those that it is about to make.

        Every rank must ask before it makes the first of them.
        """
        if self._group is None:
            return [0] * len(passes)
        most = torch.tensor(passes)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._group)
        return [int(number) - own for number, own in zip(most, passes, strict=True)]
