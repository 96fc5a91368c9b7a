"""Steps by DeepSpeed: the optimizer's state and the gradients cut up over the ranks (ZeRO, table 6: stage 2).

DeepSpeed *averages* gradients over ranks and divides losses by its accumulation count. Here gradients are sums: the
loss is multiplied by the number of ranks, the division is switched off, and the loop says which micro-batch is the
last.

DeepSpeed is imported when an engine is made: it costs seconds, and reads `DS_ACCELERATOR` once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from valley.checkpoints.fragments import MASTER, MOMENTUM, VARIANCE, Fragment, FragmentReader
from valley.data.collate import Batch
from valley.model.modeling import ValleyForConditionalGeneration
from valley.model.vision import VisionTower
from valley.training.engines.base import BaseEngine, make_adamw
from valley.training.settings import EngineSettings, StageSettings
from valley.training.stage import ParameterGroup


def deepspeed_config(stage: StageSettings, settings: EngineSettings) -> dict[str, Any]:
    """Returns DeepSpeed's settings, all computed from ours; the learning rates are set at every step."""
    return {
        "train_micro_batch_size_per_gpu": stage.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": stage.clip_norm,
        "bf16": {"enabled": stage.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": settings.zero_stage,
            "overlap_comm": settings.overlap_comm,
            "contiguous_gradients": True,
            "offload_optimizer": {"device": "cpu" if settings.offload else "none", "pin_memory": settings.offload},
        },
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine(BaseEngine):
    """ZeRO over the ranks of torch's process group; a single process makes a group of its own."""

    def __init__(
        self,
        model: ValleyForConditionalGeneration,
        groups: Sequence[ParameterGroup],
        stage: StageSettings,
        settings: EngineSettings,
        device: torch.device,
    ) -> None:
        deepspeed = _import_deepspeed(device)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            store = dist.HashStore()  # type: ignore[attr-defined]  # public, but missing from its __all__
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        super().__init__(model, groups, stage)
        self.device = device
        model.train()
        # ZeRO-3 gathers the tower whole: ranks with more frames call its blocks more often than others.
        deepspeed.utils.set_z3_leaf_modules(model, [VisionTower])
        engine_and_optimizer: tuple[Any, ...] = deepspeed.initialize(
            model=model,
            optimizer=make_adamw(groups, stage, torch.device("cpu") if settings.offload else device),
            config=deepspeed_config(stage, settings),
        )
        self._engine, self._zero, *_ = engine_and_optimizer
        self.replicates_weights = settings.zero_stage < 3
        self._num_updates = 0

    def loss(self, batch: Batch, num_items: int) -> Float[Tensor, ""]:
        """See `Engine`."""
        loss: Tensor = self._engine(**batch.model_inputs(), num_items_in_batch=num_items).loss
        return loss.float()

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        """See `Engine`."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, factor: float) -> float:
        """See `Engine`."""
        for group, target in zip(self.groups, self._zero.param_groups, strict=True):
            target["lr"] = group.learning_rate * factor
        self._engine.step()
        self._num_updates += bool(self._engine.was_step_applied())
        return float(self._engine.get_global_grad_norm())

    @property
    def optimizer_steps(self) -> int:
        """See `BaseEngine`."""
        return self._num_updates

    def fragments(self) -> Iterator[Fragment]:
        """Yields the pieces of parameters that lie in this rank's partition of the flat optimizer state."""
        for piece in self._pieces():
            state = self._zero.optimizer.state.get(piece.flat, {})
            tensors = {MASTER: piece.flat, **{kind: state[kind] for kind in (MOMENTUM, VARIANCE) if kind in state}}
            cut = {kind: tensor.detach()[piece.begin : piece.end] for kind, tensor in tensors.items()}
            yield Fragment(piece.name, piece.offset, cut)

    def take_fragments(self, reader: FragmentReader) -> None:
        """See `BaseEngine`."""
        self._num_updates = reader.optimizer_steps
        for piece in self._pieces():
            state = self._zero.optimizer.state[piece.flat]
            if reader.optimizer_steps and MOMENTUM not in state:
                fused = piece.flat.device.type == "cuda"
                state["step"] = torch.tensor(float(reader.optimizer_steps), device="cuda" if fused else "cpu")
                state |= {kind: torch.zeros_like(piece.flat) for kind in (MOMENTUM, VARIANCE)}
            targets = {MASTER: piece.flat.data, **{kind: state[kind] for kind in (MOMENTUM, VARIANCE) if kind in state}}
            for kind, target in targets.items():
                values = reader.read(piece.name, kind, piece.offset, piece.end - piece.begin)
                target[piece.begin : piece.end].copy_(values)
        self._publish_masters()

    def gathered(self, tensor: Tensor) -> AbstractContextManager[object]:
        """Under ZeRO-3 a weight is whole only while it is asked for; all ranks ask together."""
        if not hasattr(tensor, "ds_id"):
            return nullcontext()
        import deepspeed

        context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters([tensor])
        return context

    def _pieces(self) -> Iterator[_Piece]:
        """Yields where each parameter lies in the flat fp32 partitions; DeepSpeed has no public name for this."""
        for index, group in enumerate(self.groups):
            parameters: dict[str, Any] = dict(group.parameters)
            for name, parameter in parameters.items():
                if hasattr(parameter, "ds_id"):  # ZeRO-3: every parameter is cut evenly over the ranks
                    flat_index, begin, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
                    offset = self.rank * length
                    length = min(length, parameter.ds_numel - offset)
                    if length > 0:
                        flat = self._zero.fp32_partitioned_groups_flat[flat_index]
                        yield _Piece(name, offset, flat, begin, begin + length)
                elif (place := parameter._hp_mapping) is not None:  # ZeRO-1 and 2: the whole group is cut evenly
                    begin, length = place.hp_fragment_address.start, place.hp_fragment_address.numel
                    flat = self._zero.single_partition_of_fp32_groups[index]
                    yield _Piece(name, place.lp_fragment_address.start, flat, begin, begin + length)

    def _publish_masters(self) -> None:
        """Brings the weights that compute in line with the masters, on all ranks."""
        if self.replicates_weights:
            self._zero.update_lp_params()
            return
        for index in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        if persistent := self._zero.persistent_parameters:
            persistent[0].partition(persistent, has_been_updated=False)
            persistent[0].all_gather(persistent)


class _Piece(NamedTuple):
    """Part of a parameter: `flat[begin:end]` holds what follows `offset` in the flattened parameter."""

    name: str
    offset: int
    flat: Tensor
    begin: int
    end: int


def _import_deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed for a kind of device; it says far too much at INFO."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # On CPUs it would compile a shared-memory collective first (minutes on a busy machine; for ever behind the lock
        # of a compilation that was killed), which only inference uses. Training reduces through torch.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
