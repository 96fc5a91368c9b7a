"""Steps in plain PyTorch: one process, or several that sum their gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from valley.checkpoints.fragments import MASTER, MOMENTUM, VARIANCE, Fragment, FragmentReader
from valley.data.collate import Batch
from valley.model.modeling import ValleyForConditionalGeneration
from valley.training.engines.base import BaseEngine, make_adamw
from valley.training.settings import EngineSettings, StageSettings
from valley.training.stage import ParameterGroup


class TorchEngine(BaseEngine):
    """Every rank holds all weights and all optimizer state. With bf16, autocast computes on the fp32 masters."""

    def __init__(
        self,
        model: ValleyForConditionalGeneration,
        groups: Sequence[ParameterGroup],
        stage: StageSettings,
        settings: EngineSettings,
        device: torch.device,
    ) -> None:
        super().__init__(model, groups, stage)
        self.device = device
        nn.Module.to(model, device)
        model.train()
        self._parameters = [parameter for group in self.groups for parameter in group.parameters.values()]
        self._optimizer = make_adamw(groups, stage, device)
        self._num_updates = 0
        if self.world_size > 1:
            for parameter in model.parameters():  # frozen ones too: a rank may have had another file
                dist.broadcast(parameter.data, src=0)

    def loss(self, batch: Batch, num_items: int) -> Float[Tensor, ""]:
        """See `Engine`."""
        with self.precision():
            loss: Tensor = self.model(**batch.model_inputs(), num_items_in_batch=num_items).loss
        return loss.float()

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        """See `Engine`."""
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if last and self.world_size > 1:
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                work.wait()

    def step(self, factor: float) -> float:
        """See `Engine`."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.stage.clip_norm).item()
        if math.isfinite(norm):
            for group, target in zip(self.groups, self._optimizer.param_groups, strict=True):
                target["lr"] = group.learning_rate * factor
            self._optimizer.step()
            self._num_updates += 1
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def precision(self) -> AbstractContextManager[object]:
        """See `BaseEngine`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.stage.precision == "bf16")

    @property
    def optimizer_steps(self) -> int:
        """See `BaseEngine`."""
        return self._num_updates

    def fragments(self) -> Iterator[Fragment]:
        """Yields every trained parameter whole on rank 0, nothing on the others, which hold the same."""
        if self.rank != 0:
            return
        for group in self.groups:
            for name, parameter in group.parameters.items():
                state = self._optimizer.state.get(parameter, {})
                averages = {kind: state[kind].view(-1) for kind in (MOMENTUM, VARIANCE) if kind in state}
                yield Fragment(name, 0, {MASTER: parameter.detach().view(-1), **averages})

    def take_fragments(self, reader: FragmentReader) -> None:
        """See `BaseEngine`."""
        self._num_updates = reader.optimizer_steps
        for group in self.groups:
            for name, parameter in group.parameters.items():
                parameter.data.copy_(self._read(reader, name, MASTER, parameter))
                if reader.optimizer_steps:
                    self._optimizer.state[parameter] = {
                        "step": self._step_count(reader.optimizer_steps),
                        MOMENTUM: self._read(reader, name, MOMENTUM, parameter),
                        VARIANCE: self._read(reader, name, VARIANCE, parameter),
                    }

    def _read(self, reader: FragmentReader, name: str, kind: str, parameter: Tensor) -> Tensor:
        return reader.read(name, kind, 0, parameter.numel()).view_as(parameter).to(parameter.device)

    def _step_count(self, num_updates: int) -> Tensor:
        """AdamW's own counter: a float tensor, on the GPU when it is fused there."""
        return torch.tensor(float(num_updates), device=self.device if self.device.type == "cuda" else "cpu")
