"""Numbers of a batch whose shards are held by the processes of a group. Without a group the batch is this process's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Total(torch.autograd.Function):
    """The sum over a group, of what is part of every process's loss: the gradients of all of them are summed up too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        value = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(gradient, ctx.group), None


def total(value: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The sum of every process's ``value``, on each of them."""
    return _Total.apply(value, group)


def mean(terms: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """Mean of ``terms`` over dimension 0, the batch, of which each process of the group holds any number."""
    # An exporter takes what len() says for a constant.
    if group is None:
        # Of a DTensor's shards of unequal size a mean would be gathered, a sum is not.
        return terms.mean(0) if type(terms) is Tensor else terms.sum(0) / terms.shape[0]
    sums = terms.sum(0)
    count = sums.new_full((1,), terms.shape[0])
    sums, count = total(torch.cat((sums.flatten(), count)), group).split((sums.numel(), 1))
    return (sums / count).reshape(terms.shape[1:])
