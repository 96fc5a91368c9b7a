"""The seam between the training loop and whatever carries out a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from valley.checkpoints.fragments import Fragment, FragmentReader, copy_fragments, write_fragments
from valley.checkpoints.places import Place
from valley.checkpoints.rng import restore_rng, rng_state
from valley.checkpoints.store import WEIGHTS_FILE
from valley.data.collate import Batch
from valley.model.modeling import ValleyForConditionalGeneration
from valley.training.settings import StageSettings
from valley.training.stage import ParameterGroup

T = TypeVar("T")

STATE_FILE = "state.safetensors"
"""A rank's share of the master weights and the optimizer's averages."""
RNG_FILE = "rng.safetensors"


@runtime_checkable
class Engine(Protocol):
    """Carries out optimizer steps over all ranks.

    The loss of a step is the sum of token losses over the global batch, divided by the number of supervised tokens in
    it. So every micro-batch's loss comes divided by that global number, gradients are *summed* over micro-batches and
    ranks, and how the batch is split changes nothing (spec section 7).

    Attributes:
        rank: this process among those that train together.
        world_size: how many they are.
        device: where this rank computes.
        model: the bare model, its weights those of the last step.
        groups: what trains.
        replicates_weights: whether every rank holds all weights, and can run the model without the others.
    """

    rank: int
    world_size: int
    device: torch.device
    model: ValleyForConditionalGeneration
    groups: tuple[ParameterGroup, ...]
    replicates_weights: bool

    def loss(self, batch: Batch, num_items: int) -> Float[Tensor, ""]:
        """Returns a micro-batch's part of the loss: its token losses, summed, over `num_items`."""
        ...

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        """Adds a micro-batch's gradients; with the `last` of a step they are summed over the ranks."""
        ...

    def step(self, factor: float) -> float:
        """Clips the gradients, updates the weights at `factor` times each group's learning rate, drops the gradients.

        The weights stay as they are when a gradient is not finite.

        Returns:
            The norm of all gradients together, before clipping.
        """
        ...

    def inference(self) -> AbstractContextManager[None]:
        """Within: evaluation mode, no gradients, and the precision that training computes in."""
        ...

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Returns the sums over ranks, in float64; a barrier too."""
        ...

    def all_gather(self, items: Sequence[T]) -> list[T]:
        """Returns the items of all ranks, in the order of ranks; for small things, seldom."""
        ...

    def snapshot(self) -> Callable[[Path], None]:
        """Copies this rank's share of weights, optimizer state and random generators into CPU memory.

        Returns:
            What writes the copies into a folder; it may do so on another thread while the training goes on.
        """
        ...

    def load(self, folders: Sequence[Place]) -> None:
        """Goes on from what any engine on any number of ranks saved: the folders of all its ranks, in order."""
        ...

    def whole_weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the model's whole state dict in `dtype` on rank 0, nothing on others; all ranks call it."""
        ...


class BaseEngine:
    """What the engines share: who the ranks are, and what a rank saves."""

    def __init__(
        self, model: ValleyForConditionalGeneration, groups: Sequence[ParameterGroup], stage: StageSettings
    ) -> None:
        self.model, self.groups, self.stage = model, tuple(groups), stage
        self.rank, self.world_size = place_among_ranks()
        self.device = torch.device("cpu")
        self.replicates_weights = True

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """See `Engine`."""
        if self.world_size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def all_gather(self, items: Sequence[T]) -> list[T]:
        """See `Engine`."""
        if self.world_size == 1:
            return list(items)
        gathered: list[Sequence[T]] = [()] * self.world_size
        dist.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]

    @contextmanager
    def inference(self) -> Iterator[None]:
        """See `Engine`."""
        self.model.train(False)
        try:
            with torch.no_grad(), self.precision():
                yield
        finally:
            self.model.train()

    def snapshot(self) -> Callable[[Path], None]:
        """See `Engine`."""
        trained = {name: parameter for group in self.groups for name, parameter in group.parameters.items()}
        weights, state, steps = self._collect(trained, None), copy_fragments(self.fragments()), self.optimizer_steps
        generators = rng_state()

        def write(folder: Path) -> None:
            if weights:
                save_file(weights, folder / WEIGHTS_FILE)
            write_fragments(folder / STATE_FILE, state, steps)
            save_file(generators, folder / RNG_FILE)

        return write

    def load(self, folders: Sequence[Place]) -> None:
        """See `Engine`."""
        self.take_fragments(FragmentReader([folder / STATE_FILE for folder in folders]))
        if self.rank < len(folders):
            restore_rng(folders[self.rank] / RNG_FILE)

    def whole_weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `Engine`."""
        return self._collect(self.model.state_dict(keep_vars=True), dtype)

    def precision(self) -> AbstractContextManager[object]:
        """The context that gives a forward pass the stage's compute precision."""
        return nullcontext()

    def gathered(self, tensor: Tensor) -> AbstractContextManager[object]:
        """The context within which `tensor` is whole on rank 0."""
        return nullcontext()

    @property
    def optimizer_steps(self) -> int:
        """Updates made so far; fewer than steps where gradients were not finite."""
        raise NotImplementedError

    def fragments(self) -> Iterable[Fragment]:
        """Yields this rank's share of the optimizer's state."""
        raise NotImplementedError

    def take_fragments(self, reader: FragmentReader) -> None:
        """Takes over this rank's share of the optimizer's state, and the weights that follow from it."""
        raise NotImplementedError

    def _collect(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Copies tensors to rank 0's memory, floats in `dtype`; tensors that are one (tied weights) stay one."""
        copies: dict[int, Tensor] = {}
        collected: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            with self.gathered(tensor):
                if self.rank == 0:
                    target = dtype if dtype and tensor.is_floating_point() else tensor.dtype
                    if id(tensor) not in copies:
                        copies[id(tensor)] = tensor.detach().to("cpu", target, copy=True).contiguous()
                    collected[name] = copies[id(tensor)]
        return collected


def place_among_ranks() -> tuple[int, int]:
    """Returns this process's rank and the number of ranks; a process without a group is alone."""
    in_group = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)


def make_adamw(groups: Sequence[ParameterGroup], stage: StageSettings, device: torch.device) -> torch.optim.AdamW:
    """Returns the optimizer of both engines, one parameter group a module, its rates at their peaks."""
    return torch.optim.AdamW(
        [{"params": list(group.parameters.values()), "lr": group.learning_rate} for group in groups],
        betas=stage.betas,
        eps=stage.eps,
        weight_decay=stage.weight_decay,
        fused=device.type == "cuda",
    )
