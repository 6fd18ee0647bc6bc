"""How tensors travel between the ranks of a process group, and who meets whom."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Shape = tuple[tuple[int, ...], torch.dtype]


def wire_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where tensors of ``device`` must lie for the group to carry them: there, or on the CPU.

    Gloo moves GPU tensors in some of its operations only, so those go over the CPU.

    Raises:
        ValueError: The group carries neither that kind of tensor nor CPU tensors.
    """
    pairs = dist.get_backend_config(group).lower().split(",")
    carried = dict(pair.split(":")[:2] for pair in pairs)
    if device.type in carried and (device.type == "cpu" or carried[device.type] != "gloo"):
        return device
    if "cpu" in carried:
        return torch.device("cpu")
    raise ValueError(
        f"group must carry tensors of the samples' device {device}, "
        f"got one for {', '.join(carried)} alone"
    )


class Posted(NamedTuple):
    """Messages on their way; holds on to what is being sent."""

    works: list[dist.Work]
    sent: list[Tensor]
    received: list[Tensor]
    home: torch.device

    def wait(self) -> list[Tensor]:
        """The received tensors; on a GPU its stream waits, not the host."""
        for work in self.works:
            work.wait()
        return [t.to(self.home) for t in self.received]


class Wire:
    """Moves tensors that lie on ``device`` between the ranks of a group."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.home, self.device = group, device, wire_device(group, device)
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, row: Tensor) -> Tensor:
        """``[world, ...]`` every rank's tensor, in rank order, with the same bits everywhere."""
        row = row.to(self.device)
        rows = [torch.empty_like(row) for _ in range(self.world)]
        dist.all_gather(rows, row, group=self.group)
        return torch.stack(rows).to(self.home)

    def sum(self, share: Tensor) -> Tensor:
        """The sum of all ranks' tensors."""
        total = share.to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(self.home)

    def from_rank(self, rank: int, value: Tensor) -> Tensor:
        """What ``value`` is on one rank."""
        value = value.to(self.device, copy=True)
        dist.broadcast(value, group=self.group, group_src=rank)
        return value.to(self.home)

    def post(self, sends: list[Tensor], to: int, shapes: list[Shape], origin: int) -> Posted:
        """Starts sending tensors to one rank and receiving others from another one."""
        sent = [t.to(self.device).contiguous() for t in sends]
        received = [torch.empty(shape, dtype=t, device=self.device) for shape, t in shapes]
        operations = [
            dist.P2POp(operation, tensor, group=self.group, group_peer=peer)
            for operation, tensors, peer in ((dist.isend, sent, to), (dist.irecv, received, origin))
            for tensor in tensors
            if tensor.numel()
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return Posted(works, sent, received, self.home)


def products(rank: int, visitor: int, world: int) -> tuple[tuple[int, int], ...]:
    """The (own sample, visiting sample) pairs that a rank sums over when another one visits.

    Ranks half the ring apart visit each other: the lower one takes its source, with both visiting
    samples, and the other one what is left, which is the lower one's target with both of its own.
    """
    if 2 * ((visitor - rank) % world) != world:
        return ((0, 0), (0, 1), (1, 0), (1, 1))
    return ((0, 0), (0, 1)) if rank < visitor else ((0, 1), (1, 1))


def visiting(rank: int, visitor: int, world: int) -> list[int]:
    """The samples a visitor must bring."""
    return sorted({b for _, b in products(rank, visitor, world)})


def column_sums(values: Tensor) -> Tensor:
    """[D] from [n, D]; on the CPU in an order that no thread count changes, unlike torch's own."""
    if values.device.type != "cpu":
        return values.sum(0)
    return torch.from_numpy(np.add.reduce(values.numpy(), axis=0))
