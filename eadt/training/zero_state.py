"""Reads and writes the state of a DeepSpeed engine, fragment by fragment, without a collective.

Owns all knowledge of where DeepSpeed keeps fp32 weights and optimizer moments in ZeRO stages 0 to 3
(DeepSpeed 0.19; the private names used are asserted by ``tests/contract/test_deepspeed_names.py``).
Everything is seen as fragments: a run of elements on the layout's axis with one tensor per row.

- Stage 3: rank r holds elements r·psz to (r+1)·psz of each flattened parameter, psz being
  ``ds_tensor.ds_numel`` rounded up by the number of ranks; the last part is padded.
- Stages 1 and 2: ``param._hp_mapping`` says which part of a parameter lies in this rank's flat
  partition. The model's own weights are whole on every rank.
- Stage 0: everything is whole on every rank; each rank saves an equal share of the axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from eadt.errors import ConfigError
from eadt.training.state import Span, StateLayout, StateReader, StateSlot, merge_spans

_MOMENTS_BY_OPTIMIZER = {
    "Adam": ("exp_avg", "exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "FusedAdam": ("exp_avg", "exp_avg_sq"),
    "DeepSpeedCPUAdam": ("exp_avg", "exp_avg_sq"),
    "Lion": ("exp_avg",),
    "FusedLion": ("exp_avg",),
    "DeepSpeedCPULion": ("exp_avg",),
}


@dataclass
class Fragment:
    """A run of elements that this rank holds.

    Attributes:
        start: First element on the layout's axis.
        rows: One flat tensor per row, all of the same length, views into DeepSpeed's storage.
    """

    start: int
    rows: dict[str, torch.Tensor]

    @property
    def span(self) -> Span:
        """The fragment's place on the axis."""
        return self.start, self.start + self.rows["fp32"].numel()


class EngineState:
    """The state of one rank's DeepSpeed engine.

    Args:
        engine: What ``deepspeed.initialize`` returned.
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(self, engine: Any, rank: int, world_size: int) -> None:
        self._engine = engine
        self._rank = rank
        self._world_size = world_size
        self._stage = int(engine.zero_optimization_stage())
        self._zero = engine.optimizer
        self._inner = getattr(self._zero, "optimizer", self._zero)
        self._moments = moment_names(self._inner)
        self._places: dict[int, tuple[torch.Tensor, int]] | None = None
        self._named: list[tuple[str, Any]] = list(_named_tensors(engine.module))
        self.layout = StateLayout(
            names=tuple(name for name, _ in self._named),
            shapes=tuple(_full_shape(tensor) for _, tensor in self._named),
            rows=("fp32", *self._moments),
        )

    def owned_spans(self) -> list[Span]:
        """Elements that this rank saves, merged."""
        return merge_spans(fragment.span for fragment in self._fragments(for_saving=True))

    def save(self, slot: StateSlot) -> None:
        """Copy this rank's share into the slot."""
        for fragment in self._fragments(for_saving=True):
            low, high = fragment.span
            for name, tensor in fragment.rows.items():
                torch.from_numpy(slot.row(name))[low:high].copy_(tensor.detach())

    @torch.no_grad()
    def load(self, reader: StateReader, optimizer_step: float) -> None:
        """Fill this rank's share from a saved state and bring the model's weights in line.

        Args:
            reader: Source of the elements.
            optimizer_step: Steps that the optimizer had taken; 0 leaves its state empty.
        """
        if optimizer_step > 0:
            self._create_moments(optimizer_step)
        for fragment in self._fragments(for_saving=False):
            for name, tensor in fragment.rows.items():
                if name == "fp32" or optimizer_step > 0:
                    _read_into(reader, name, fragment.start, tensor)
        self._refresh_weights(reader)

    def optimizer_step(self) -> float:
        """Steps that the optimizer has taken, for its bias correction; 0 before the first."""
        for state in self._inner.state.values():
            if "step" in state:
                return float(state["step"])
        if self._inner.state and "step" not in self._inner.param_groups[0]:
            return 1.0  # an optimizer that does not count, such as SGD: all that matters is "some"
        return float(self._inner.param_groups[0].get("step", 0))

    # -- where things are ---------------------------------------------------------------------

    def _fragments(self, *, for_saving: bool) -> Iterator[Fragment]:
        for name, tensor in self._named:
            offset = self.layout.offsets[name]
            if self._stage == 3 and hasattr(tensor, "ds_tensor"):
                yield from self._stage3_fragments(tensor, offset)
            elif hasattr(tensor, "_hp_mapping"):
                yield from self._mapped_fragments(tensor, offset)
            elif self._stage == 0 and tensor.requires_grad:
                yield from self._whole_fragments(tensor, offset, for_saving=for_saving)
            elif not for_saving or self._rank == 0:
                # Frozen parameters and buffers: whole on every rank, saved by the first.
                yield Fragment(offset, {"fp32": tensor.detach().view(-1)})

    def _stage3_fragments(self, param: Any, offset: int) -> Iterator[Fragment]:
        size = param.ds_tensor.numel()
        start = self._rank * size
        length = min(size, param.ds_numel - start)
        if length <= 0:
            return
        if not param.requires_grad:
            yield Fragment(offset + start, {"fp32": param.ds_tensor.detach().view(-1)[:length]})
            return
        group, position, _ = self._zero.grad_position[self._zero.get_param_id(param)]
        flat = self._zero.fp32_partitioned_groups_flat[group]
        rows = {"fp32": flat.detach().narrow(0, position, length)}
        for key, value in self._moments_of(flat).items():
            rows[key] = value.narrow(0, position, length)
        yield Fragment(offset + start, rows)

    def _mapped_fragments(self, param: Any, offset: int) -> Iterator[Fragment]:
        mapping = param._hp_mapping
        if mapping is None:  # lies in other ranks' partitions only
            return
        address = mapping.hp_fragment_address
        flat = self._flat_partition(param)
        rows = {"fp32": mapping.hp_fragment.detach()}
        for key, value in self._moments_of(flat).items():
            rows[key] = value.narrow(0, address.start, address.numel)
        yield Fragment(offset + mapping.lp_fragment_address.start, rows)

    def _whole_fragments(self, param: torch.Tensor, offset: int, *, for_saving: bool) -> Iterator[Fragment]:
        low, high = offset, offset + param.numel()
        if for_saving:  # an equal share of the axis each
            total = self.layout.num_elements
            low = max(low, total * self._rank // self._world_size)
            high = min(high, total * (self._rank + 1) // self._world_size)
        if low >= high:
            return
        holder, position = self._master(param)
        start = position + low - offset
        rows = {"fp32": holder.detach().view(-1).narrow(0, start, high - low)}
        for key, value in self._moments_of(holder).items():
            rows[key] = value.view(-1).narrow(0, start, high - low)
        yield Fragment(low, rows)

    def _flat_partitions(self) -> list[torch.Tensor]:
        """The flat fp32 tensors that the inner optimizer steps, in stages 1 to 3."""
        for attribute in (
            "fp32_partitioned_groups_flat",  # stage 3
            "single_partition_of_fp32_groups",  # stages 1 and 2
            "fp32_groups_flat_partition",  # stage 1 with bf16 and fp32 accumulation
        ):
            partitions = getattr(self._zero, attribute, None)
            if partitions is not None:
                return list(partitions)
        raise AssertionError(f"{type(self._zero).__name__} keeps its partitions where we do not know")

    def _flat_partition(self, param: Any) -> torch.Tensor:
        flat: torch.Tensor = self._flat_partitions()[param._hp_mapping.param_group_index]
        return flat

    def _masters(self) -> dict[int, tuple[torch.Tensor, int]]:
        """Stage 0: where each parameter's fp32 values are (tensor, first element), by id."""
        zero = self._zero
        if hasattr(zero, "fp32_groups_flat"):  # FP16_Optimizer: one flat tensor a group
            places: dict[int, tuple[torch.Tensor, int]] = {}
            for params, flat in zip(zero.fp16_groups, zero.fp32_groups_flat, strict=True):
                position = 0
                for param in params:
                    places[id(param)] = (flat, position)
                    position += param.numel()
            return places
        if hasattr(zero, "fp32_groups"):  # FP16_UnfusedOptimizer: one tensor a parameter
            pairs = zip(zero.fp16_groups, zero.fp32_groups, strict=True)
            return {
                id(param): (master, 0)
                for params, masters in pairs
                for param, master in zip(params, masters, strict=True)
            }
        return {id(param): (param, 0) for _, param in self._named}

    def _master(self, param: torch.Tensor) -> tuple[torch.Tensor, int]:
        if self._stage != 0:
            return param, 0
        if self._places is None:
            self._places = self._masters()
        return self._places[id(param)]

    def _moments_of(self, holder: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self._inner.state.get(holder, {})
        return {key: state[key] for key in self._moments if key in state}

    # -- loading ------------------------------------------------------------------------------

    def _create_moments(self, optimizer_step: float) -> None:
        """Make the optimizer state that its first step would otherwise make."""
        if self._stage == 0:
            holders = {id(holder): holder for holder, _ in self._masters().values() if holder.requires_grad}
            tensors = list(holders.values())
        else:
            tensors = self._flat_partitions()
        for tensor in tensors:
            state: dict[str, Any] = {key: torch.zeros_like(tensor.detach()) for key in self._moments}
            if "step" not in self._inner.param_groups[0]:
                state["step"] = (
                    int(optimizer_step)
                    if type(self._inner).__name__.startswith("DeepSpeedCPU")
                    else torch.tensor(optimizer_step, dtype=torch.float32)
                )
            self._inner.state[tensor] = state
        for group in self._inner.param_groups:
            if "step" in group:  # FusedAdam counts once a group
                group["step"] = int(optimizer_step)
        if self._stage in (1, 2):
            for _, param in self._named:
                mapping = getattr(param, "_hp_mapping", None)
                if mapping is not None:
                    flat = self._flat_partition(param)
                    mapping.set_optim_state_fragment(flat, self._inner.state[flat])
            # Else the first step would link the fragments again; harmless, but not needed.
            self._zero._hp_optimizer_states_linked = True

    def _refresh_weights(self, reader: StateReader) -> None:
        """Make the weights that forward uses equal to the fp32 ones that were just loaded."""
        for name, tensor in self._named:
            offset = self.layout.offsets[name]
            if self._stage == 3 and hasattr(tensor, "ds_tensor"):
                if tensor.ds_status.name == "AVAILABLE":
                    tensor.partition()  # a gathered copy would be stale
                for fragment in self._stage3_fragments(tensor, offset):
                    length = fragment.rows["fp32"].numel()
                    tensor.ds_tensor.data.view(-1)[:length].copy_(fragment.rows["fp32"])
            elif hasattr(tensor, "_hp_mapping"):
                _read_into(reader, "fp32", offset, tensor.data.view(-1))
            elif self._stage == 0 and tensor.requires_grad:
                holder, position = self._master(tensor)
                if holder is not tensor:
                    fp32 = holder.detach().view(-1).narrow(0, position, tensor.numel())
                    tensor.data.view(-1).copy_(fp32)


def moment_names(optimizer: Any) -> tuple[str, ...]:
    """Names of the per-element optimizer states that must travel with the weights.

    Raises:
        ConfigError: EADT-240, for an optimizer whose state EADT cannot move.
    """
    name = type(optimizer).__name__
    if name == "SGD":
        return ("momentum_buffer",) if optimizer.param_groups[0].get("momentum") else ()
    if name in _MOMENTS_BY_OPTIMIZER:
        return _MOMENTS_BY_OPTIMIZER[name]
    raise ConfigError(
        f"the optimizer {name} cannot be resized while training",
        code="EADT-240",
        fix="use one of " + ", ".join([*sorted(_MOMENTS_BY_OPTIMIZER), "SGD"]),
    )


def _named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters (tied ones once) and the floating-point buffers that belong to the state."""
    yield from module.named_parameters()
    persistent = set(module.state_dict(keep_vars=True))
    for name, buffer in module.named_buffers():
        if name in persistent and buffer.is_floating_point():
            yield name, buffer


def _full_shape(tensor: Any) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _read_into(reader: StateReader, row: str, start: int, target: torch.Tensor) -> None:
    if target.dtype == torch.float32 and target.device.type == "cpu" and target.is_contiguous():
        reader.read(row, start, target.detach().numpy())
        return
    host = torch.empty(target.numel(), dtype=torch.float32)
    reader.read(row, start, host.numpy())
    target.copy_(host)
