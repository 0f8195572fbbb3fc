"""What vLLM's CPU build lacks for data parallelism: the two collectives by which MoE layers trade tokens.

Named as `worker_extension_cls`, this is imported in every worker, before that is made. vLLM 0.33 wants a memory node
for each rank, too; here all have the one there is. All else is vLLM's.
"""

from __future__ import annotations

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.v1.worker import cpu_worker

_memory_nodes = cpu_worker.get_visible_memory_node


def all_gatherv(
    self: CpuCommunicator, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """Rows of all ranks one after another, `sizes` of them from each."""
    if isinstance(input_, list):
        return [self.all_gatherv(one, dim, sizes) for one in input_]
    sizes = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: len(input_)] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=self.cpu_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(
    self: CpuCommunicator, input_: torch.Tensor, dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor:
    """This rank's rows of the sum over ranks."""
    total = input_.clone()
    torch.distributed.all_reduce(total, group=self.cpu_group)
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    return total.split(sizes)[self.rank_in_group]


cpu_worker.get_visible_memory_node = lambda *_: _memory_nodes()
CpuCommunicator.all_gatherv = all_gatherv
CpuCommunicator.reduce_scatterv = reduce_scatterv


class DataParallelWorker:
    """Nothing: the plugin adds its own methods."""
