"""Makes a training loop elastic: the loop says what it computes, the session does the rest.

A training function gets one :class:`TrainingSession` and looks like a plain loop::

    def train(session: TrainingSession) -> None:
        engine = session.prepare(build_model)
        for step in session.steps():
            for rows in session.micro_batches(len(dataset)):
                loss = engine(**collate(dataset, rows)).loss
                engine.backward(loss)
                engine.step()
                session.record_loss(loss)

It runs anew in each generation; ``steps()`` goes on where the last one stopped, and ends when the
run is complete or the next generation takes over. Shape legend: B micro batch.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, SupportsFloat

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from eadt.clock import SYSTEM_CLOCK, monotonic_s
from eadt.training.channel import AgentGoneError, EngineChannel
from eadt.training.deepspeed_setup import deepspeed_config, initialize_deepspeed
from eadt.training.engine_spec import Action, EngineSpec
from eadt.training.sampler import SampleOrder, micro_batches
from eadt.training.state import SavedState, StateReader, StateSlot
from eadt.training.zero_state import EngineState

ModelFactory = Callable[[], torch.nn.Module]
OptimizerFactory = Callable[[torch.nn.Module], torch.optim.Optimizer]

_SCHEDULED = ("lr", "betas", "momentum")
"""What a scheduler sets in an optimizer's parameter groups."""

_RENDEZVOUS_TIMEOUT = timedelta(seconds=120)


class TrainingSession:
    """One rank of one generation, as a training function sees it. Not thread-safe.

    Attributes:
        rank: This rank.
        world_size: Ranks in this generation; may be another in the next.
        step: Optimizer steps done so far in the run.
        max_steps: Optimizer steps at which the run is complete.
        device: Where tensors go.
        weights_follow: Whether the model's weights will be loaded from a state, so that
            :meth:`prepare`'s factory need not compute or read initial ones.
        engine: The DeepSpeed engine, after :meth:`prepare`.
    """

    def __init__(self, spec: EngineSpec, channel: EngineChannel) -> None:
        self.spec = spec
        self.rank = spec.rank
        self.world_size = spec.world_size
        self.step = 0
        self.max_steps = spec.job.max_steps
        self.device = torch.device("cpu" if spec.device == "cpu" else "cuda:0")
        self.engine: Any = None
        self.weights_follow = spec.resume
        self._channel = channel
        self._state: EngineState | None = None
        self._model_factory: ModelFactory | None = None
        self._slots: dict[int, StateSlot] = {}
        self._free_slots: list[int] = []
        self._orders: dict[int, SampleOrder] = {}
        self._control: dist.ProcessGroup | None = None
        self._stop_asked = False
        self._save_asked = False
        self._last_save_step = 0
        self._handed_over = False
        self._losses: list[torch.Tensor] = []
        self._unreported: _EndedStep | None = None
        self._begun_s = 0.0
        self._computed_s: float | None = None
        self._input_s = 0.0
        self._user_meta: dict[str, Any] = {}
        self._timings: dict[str, float] = {}

    # -- for training functions -----------------------------------------------------------------

    @property
    def training(self) -> Any:
        """The configuration's ``training`` section."""
        return self.spec.job.training

    @property
    def state(self) -> dict[str, Any]:
        """Small JSON values of the user's own that travel with the run (the first rank's count)."""
        return self._user_meta

    def prepare(self, model_factory: ModelFactory, optimizer_factory: OptimizerFactory | None = None) -> Any:
        """Build the model and its DeepSpeed engine, and take over the state of the run.

        Blocks until the generation before has handed its state over.

        Args:
            model_factory: Builds the model, with the same initial weights on every rank.
            optimizer_factory: Builds the optimizer for the model; by default AdamW with the
                configuration's learning rate and weight decay (none on biases and norms). Ignored
                where the ``deepspeed`` section has an optimizer.

        Returns:
            The DeepSpeed engine: call it, then ``engine.backward(loss)`` and ``engine.step()``.
        """
        started_s = monotonic_s()
        self._join_group()
        self._lap("group_s", started_s)
        started_s = monotonic_s()
        torch.manual_seed(self.spec.job.seed)
        self._model_factory = model_factory
        model = self._build_model()
        self._lap("model_s", started_s)
        started_s = monotonic_s()
        config = deepspeed_config(self.spec)
        self.engine = initialize_deepspeed(self.spec, model, optimizer_factory, config, self.device)
        self._state = EngineState(self.engine, self.rank, self.world_size)
        self._lap("engine_s", started_s)
        self._channel.send(
            "ready",
            layout=self._state.layout,
            spans=tuple(self._state.owned_spans()),
            num_params=sum(_numel(param) for param in model.parameters()),
            timings=dict(self._timings),
            device_bytes=_device_bytes(self.device),
        )
        _, saved, free_slots = self._channel.wait("go")
        self._free_slots.extend(free_slots)
        self._take_over(saved)
        return self.engine

    def steps(self) -> Iterator[int]:
        """The steps that this generation does, each the number of steps done before it."""
        while self.step < self.max_steps:
            exchange = self._begin_step()
            yield self.step
            ended = self._end_step()
            action, slot, loss = exchange.wait()
            self._report(self._unreported, loss)
            self._unreported = ended
            if action is not Action.GO_ON:
                self._report_now()
                self._save(slot, stop=action is Action.SAVE_AND_STOP)
            if action is Action.SAVE_AND_STOP:
                return
        self._report_now()

    def micro_batches(self, num_samples: int) -> Iterator[npt.NDArray[np.int64]]:
        """This rank's micro-batches of the present step, as indices ``[B]`` into the data.

        The order is fixed by the run's seed and the epoch; over all ranks each sample comes
        exactly once an epoch, whatever the number of workers was on the way.
        """
        order = self._orders.setdefault(num_samples, SampleOrder(num_samples, self.spec.job.seed))
        duty = self.spec.share.duty_fraction
        for position, samples in micro_batches(order, self.step, self.rank, self.spec.batch):
            begun_s = monotonic_s()
            # Dropout and the like depend on the sample, not on who computes it or what came before.
            torch.manual_seed(hash((self.spec.job.seed, position)) & 0x7FFFFFFF)
            yield samples
            if duty < 1.0:
                self._synchronize()
                SYSTEM_CLOCK.sleep((monotonic_s() - begun_s) * (1.0 / duty - 1.0))
        self._synchronize()
        self._computed_s = monotonic_s()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around the reading of a micro-batch: its time is reported as waiting for input."""
        begun_s = monotonic_s()
        try:
            yield
        finally:
            self._input_s += monotonic_s() - begun_s

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Around a validation: its time and energy are reported as such, not as useful work."""
        self._say_use("validation")
        try:
            yield
        finally:
            self._say_use("useful")

    def record_loss(self, loss: torch.Tensor) -> None:
        """Tell the loss of one micro-batch; the mean over the global batch is reported."""
        self._losses.append(loss.detach())

    def record_validation(self, loss: SupportsFloat) -> None:
        """Tell the validation loss after the present step; the first rank's value counts.

        Args:
            loss: A number, of numpy too, or a tensor with one element.
        """
        if self.rank == 0:
            done = self.step + int(self._computed_s is not None)
            self._channel.send("validation", step=done, loss=float(loss))

    def sum_over_ranks(self, *values: float) -> list[float]:
        """The sums of ``values`` over all ranks; each rank must call it. Blocks."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self._control)
        return [float(value) for value in tensor]

    def is_due(self, every_steps: int | None) -> bool:
        """Whether the present step is the last or one of every ``every_steps``; inside the loop."""
        done = self.step + 1
        return done == self.max_steps or bool(every_steps and done % every_steps == 0)

    # -- the life of a generation -----------------------------------------------------------------

    def finish(self) -> None:
        """After the training function has returned: hand over the final state, export the model."""
        if self._handed_over:
            return
        assert self.engine is not None, "the training function did not call session.prepare"
        slot = self._wait_for_slot() if self.rank == 0 else -1
        if self.world_size > 1:
            slot = int(self.sum_over_ranks(slot + 1)[0]) - 1
        self._save(slot, stop=True, final=True)
        if self.rank == 0:
            while True:
                kind, *arguments = self._channel.wait("export", "exit")
                if kind == "exit":
                    return
                self._export(*arguments)

    def _build_model(self) -> torch.nn.Module:
        assert self._model_factory is not None
        # Whether initial weights may be left out, where others follow, only the factory knows: a model
        # may compute with them, or with torch's initialisers, something that no state brings back.
        return self._model_factory()

    def _join_group(self) -> None:
        """Make this generation's process group on a store of its own, which ends with it."""
        spec = self.spec
        if self.rank == 0:
            store = TCPStore(
                spec.node_ip, 0, spec.world_size, is_master=True, wait_for_workers=False,
                timeout=_RENDEZVOUS_TIMEOUT,
            )  # fmt: skip
            self._channel.send("store", address=(spec.node_ip, store.port))
        else:
            _, (host, port) = self._channel.wait("rendezvous")
            store = TCPStore(host, port, spec.world_size, is_master=False, timeout=_RENDEZVOUS_TIMEOUT)
        dist.init_process_group(
            spec.backend, store=PrefixStore(str(spec.generation), store), rank=self.rank,
            world_size=spec.world_size,
            device_id=self.device if spec.backend == "nccl" else None,
        )  # fmt: skip
        self._control = dist.group.WORLD if spec.backend == "gloo" else dist.new_group(backend="gloo")

    def _take_over(self, saved: SavedState | None) -> None:
        assert self._state is not None
        started_s = monotonic_s()
        if saved is not None:
            reader = StateReader(saved, self.spec.node_id, bytes.fromhex(os.environ["EADT_RUN_KEY"]))
            self._state.load(reader, saved.meta["optimizer_step"])
            self.step = self._last_save_step = saved.step
            self._restore_meta(saved.meta)
            num_remote_bytes = reader.num_remote_bytes
            reader.close()
        else:
            num_remote_bytes = 0
        gc.freeze()  # what was built lives to the end: collections need not look at it
        self._lap("load_s", started_s)
        self._channel.send(
            "loaded",
            step=self.step,
            timings=dict(self._timings),
            num_remote_bytes=num_remote_bytes,
            t=monotonic_s(),
        )

    def _begin_step(self) -> _Exchange:
        self._begun_s, self._computed_s, self._input_s = monotonic_s(), None, 0.0
        self._losses.clear()
        self._read_commands()
        action, slot = Action.GO_ON, -1
        if self.rank == 0 and self.step + 1 < self.max_steps:
            action = self._wanted_action()
            if action is not Action.GO_ON and not self._free_slots:
                action = Action.GO_ON  # later: each state that was saved is still needed
            slot = self._free_slots[0] if action is not Action.GO_ON else -1
        return _Exchange(self._control, self.world_size, action, slot, self._unreported)

    def _wanted_action(self) -> Action:
        """Rank 0: what is to happen at the end of the step that begins."""
        if not self._channel.is_open and not self._free_slots:
            raise AgentGoneError("the node agent has gone, and there is no room to save the state")
        if self._stop_asked or not self._channel.is_open:
            return Action.SAVE_AND_STOP
        every = self.spec.job.snapshot_every_steps
        if self._save_asked or (every and self.step + 1 - self._last_save_step >= every):
            return Action.SAVE
        return Action.GO_ON

    def _wait_for_slot(self) -> int:
        self._read_commands()
        if not self._free_slots:
            self._channel.send("slot_wanted")
        while not self._free_slots:
            self._free_slots.append(self._channel.wait("free")[1])
        return self._free_slots[0]

    def _read_commands(self) -> None:
        while (command := self._channel.poll("stop", "save", "free")) is not None:
            kind, *arguments = command
            if kind == "stop":
                self._stop_asked = True
            elif kind == "save":
                self._save_asked = True
            else:
                self._free_slots.append(arguments[0])

    def _end_step(self) -> _EndedStep:
        self.step += 1
        ended = _EndedStep(
            step=self.step,
            t0=self._begun_s,
            # A user's loop that takes no micro-batches from us ends its step here.
            t1=monotonic_s() if self._computed_s is None else self._computed_s,
            learning_rate=float(self.engine.optimizer.param_groups[0]["lr"]),
            loss_sum=float(sum(float(loss) for loss in self._losses)),
            num_losses=len(self._losses),
            input_s=self._input_s,
        )
        self._computed_s = None
        return ended

    def _report(self, ended: _EndedStep | None, loss: float | None) -> None:
        if ended is None or not self.spec.primary_on_node:
            return
        num_samples = self.spec.batch.train_batch_size
        self._channel.send(
            "step",
            step=ended.step,
            t0=ended.t0,
            t1=ended.t1,
            learning_rate=ended.learning_rate,
            primary=self.rank == 0,
            loss=loss,
            samples=num_samples,
            tokens=num_samples * self.training.sequence_length,
            world_size=self.world_size,
            input_s=ended.input_s,
        )

    def _report_now(self) -> None:
        """Report the last step at once, where no further step will carry its loss."""
        if self._unreported is not None:
            totals = self.sum_over_ranks(self._unreported.loss_sum, self._unreported.num_losses)
            self._report(self._unreported, _mean(*totals))
            self._unreported = None

    def _save(self, slot_number: int, *, stop: bool, final: bool = False) -> None:
        assert self._state is not None
        started_s = monotonic_s()
        self._say_use("change" if stop and not final else "checkpoint")
        slot = self._slots.get(slot_number)
        if slot is None:
            path = self.spec.slot_paths[slot_number]
            slot = self._slots[slot_number] = StateSlot(path, self._state.layout, writable=True)
            slot.reserve(self._state.owned_spans())
        self._state.save(slot)
        self._last_save_step = self.step
        self._save_asked = False
        if self.rank == 0:
            self._free_slots.remove(slot_number)
        self._handed_over = stop
        ended_s = monotonic_s()
        self._channel.send(
            "saved",
            step=self.step,
            slot=slot_number,
            stopped=stop,
            final=final,
            meta=self._meta() if self.rank == 0 else None,
            seconds=ended_s - started_s,
            t=ended_s,
        )
        if not stop:
            self._say_use("useful")

    def _say_use(self, use: str) -> None:
        """Tell what this node's time and energy are for from now on."""
        if self.spec.primary_on_node:
            done = self.step + int(self._computed_s is not None)
            self._channel.send("use", use=use, t=monotonic_s(), step=done, primary=self.rank == 0)

    def _meta(self) -> dict[str, Any]:
        assert self._state is not None
        meta: dict[str, Any] = {
            "step": self.step,
            "optimizer_step": self._state.optimizer_step(),
            "user": self._user_meta,
        }
        if self.engine.lr_scheduler is not None:
            meta["lr_scheduler"] = self.engine.lr_scheduler.state_dict()
            # DeepSpeed's schedulers do not say what they last set, after loading.
            meta["scheduled"] = [
                {key: group[key] for key in _SCHEDULED if key in group}
                for group in self.engine.optimizer.param_groups
            ]
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        if getattr(scaler, "dynamic", False):
            meta["loss_scaler"] = {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)}
        return meta

    def _restore_meta(self, meta: dict[str, Any]) -> None:
        self._user_meta.update(meta.get("user", {}))
        scheduler = self.engine.lr_scheduler
        if scheduler is not None and "lr_scheduler" in meta:
            scheduler.load_state_dict(meta["lr_scheduler"])
            for group, values in zip(self.engine.optimizer.param_groups, meta["scheduled"], strict=True):
                group.update(values)
        if "loss_scaler" in meta:
            vars(self.engine.optimizer.loss_scaler).update(meta["loss_scaler"])
        self.engine.global_steps = self.step

    def _export(self, saved: SavedState, path: str) -> None:
        """Write the trained model as a Hugging Face folder, from the saved state."""
        from eadt.training.export import export_model

        reader = StateReader(saved, self.spec.node_id, bytes.fromhex(os.environ["EADT_RUN_KEY"]))
        self.weights_follow = True
        model = self._build_model()
        export_model(model, saved.layout, reader, self.training, path)
        reader.close()
        self._channel.send("exported", path=path)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _lap(self, part: str, started_s: float) -> None:
        self._timings[part] = monotonic_s() - started_s


@dataclass(frozen=True)
class _EndedStep:
    """A step of this rank whose loss over all ranks is not known yet; times in monotonic s."""

    step: int
    t0: float
    t1: float
    learning_rate: float
    loss_sum: float
    num_losses: int
    input_s: float


class _Exchange:
    """What ranks tell each other once a step, under way beside the computation.

    Rank 0's decision for the end of the step that runs, and the losses of the step before.
    """

    def __init__(
        self, group: Any, world_size: int, action: Action, slot: int, before: _EndedStep | None
    ) -> None:
        losses = (before.loss_sum, float(before.num_losses)) if before is not None else (0.0, 0.0)
        self._sums = torch.tensor([float(action), float(slot + 1), *losses], dtype=torch.float64)
        self._work = dist.all_reduce(self._sums, group=group, async_op=True) if world_size > 1 else None

    def wait(self) -> tuple[Action, int, float | None]:
        """The action, the slot to save into, and the mean loss of the step before."""
        if self._work is not None:
            self._work.wait()
        action, slot, loss_sum, num_losses = self._sums.tolist()
        return Action(int(action)), int(slot) - 1, _mean(loss_sum, num_losses)


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _numel(param: Any) -> int:
    return int(getattr(param, "ds_numel", param.numel()))


def _device_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
