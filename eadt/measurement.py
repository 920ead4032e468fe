"""``eadt.measure()``: the energy of a piece of work, for people who have no run.

Owns: the window and what is said of it. Must not: read a device (the meter does), or be imported with the
package. All windows of a process, nested or at the same time, share one meter; it reads only while a window
is open, and no device is touched before the first is.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot, sqrt
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.config import PowerConfig
from eadt.node.meter import Meter, Point
from eadt.node.sensors import Component, SourceSelection, detect_sources
from eadt.units import Quality, Quantity, format_duration, format_number, format_qualities, format_quantity

logger = logging.getLogger(__name__)

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

# Counters need readings at the ends only; power is integrated, so it is read often.
_INTERVAL_S, _INTERVAL_OF_POWER_S = 1.0, 0.1
# With more than this of the time unknown, energy is "at least", and a mean power would be of something else.
_AT_LEAST_FRACTION, _MEAN_POWER_FRACTION = 0.001, 0.05
_NUM_KEPT = 1000


@dataclass
class Measurement:
    """What a window used. Everything is ``None`` or empty while it is open.

    Attributes:
        name: What the caller calls it.
        seconds: Length of the window in s.
        energy_j: Of all components that could be measured, in J; ``None``: nothing could, see ``notes``.
        mean_power_w: In W; ``None`` where more than 5 % is not measured.
        quality: The worst of what is in ``energy_j``.
        uncertainty_j: Half-width of the interval that the sources state, in J; ``None``: not known.
        at_least: Whether something that draws power is not in ``energy_j``.
        by_component: J by component (``cpu``, ``dram``, ``gpu0``); ``None`` where unknown.
        qualities: Quality by component, of those that are known.
        notes: What to know about it: a window too short for its sources, what could not be measured and why.
    """

    name: str = ""
    seconds: float | None = None
    energy_j: float | None = None
    mean_power_w: float | None = None
    quality: Quality | None = None
    uncertainty_j: float | None = None
    at_least: bool = False
    by_component: dict[str, float | None] = field(default_factory=dict)
    qualities: dict[str, Quality] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line: ``load: 1.23 ± 0.06 kJ in 4.81 s, 256 W on average, measured``."""
        subject = f"{self.name or 'window'}: "
        if self.seconds is None:
            return f"{subject}not over yet"
        notes = f" ({'; '.join(self.notes)})" if self.notes else ""
        if self.energy_j is None:
            return f"{subject}energy not measured, {_length(self.seconds)}{notes}"
        energy = format_quantity(Quantity(self.energy_j, self.uncertainty_j, self.at_least), "J")
        parts = [f"{energy} in {_length(self.seconds)}"]
        if self.mean_power_w is not None:
            parts.append(f"{format_number(self.mean_power_w, 'W')} on average")
        parts.append(format_qualities(sorted({str(quality) for quality in self.qualities.values()})))
        if self.uncertainty_j is None:
            parts.append("uncertainty not known")
        return subject + ", ".join(parts) + notes


class SharedMeter:
    """One meter for all windows of a process. Thread-safe.

    Args:
        detect: Finds the sensors, at the first window.
        clock: Source of time.
    """

    def __init__(self, detect: Callable[[], SourceSelection], clock: Clock = SYSTEM_CLOCK) -> None:
        self.clock = clock
        self._detect = detect
        self._lock = threading.Lock()
        self._meter: Meter | None = None
        self._num_open = 0

    def begin(self) -> Meter:
        """A meter that reads. Each call is to be followed by one of :meth:`end`."""
        with self._lock:
            if self._meter is None:
                selection = self._detect()
                is_power = any(component.source == "nvml_power" for component in selection.components)
                interval_s = _INTERVAL_OF_POWER_S if is_power else _INTERVAL_S
                self._meter = Meter(selection.sources, self.clock, interval_s)
            self._meter.start()
            self._num_open += 1
            return self._meter

    def end(self) -> None:
        """One window less."""
        with self._lock:
            self._num_open -= 1
            if self._num_open == 0 and self._meter is not None:
                self._meter.stop()


def _new_shared_meter() -> SharedMeter:
    return SharedMeter(lambda: detect_sources(PowerConfig()))


_shared = _new_shared_meter()


def _forget_meter() -> None:
    """In a forked child: the parent's threads are not there, and its lock may be held by one of them."""
    global _shared
    _shared = _new_shared_meter()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_meter)


class measure:  # lower case, for it is used like a function
    """Measures the energy of a ``with`` block, or of each call of a function.

    ::

        with eadt.measure("load") as m:
            model = load()
        print(m)  # load: 1.23 ± 0.06 kJ in 4.81 s, 256 W on average, measured

        @eadt.measure(on_end=print)
        def evaluate(): ...

        evaluate()
        evaluate.measurements[-1].energy_j

    It counts the CPU and memory of the whole machine, with the work of others on it, and the GPUs that this
    process may use. An exception in the block passes through, and the measurement is filled nevertheless.
    Measuring itself never raises: what cannot be measured is ``None``, with the reason in ``notes``.

    Args:
        name: What to call it; by default a function's own name.
        gpus: Which GPUs to count, by index or UUID; default: those in ``CUDA_VISIBLE_DEVICES`` (its numbers
            taken in the order of the PCI bus), else all.
        on_end: Gets each measurement at its end.
    """

    def __init__(
        self,
        name: str = "",
        *,
        gpus: Sequence[int | str] | None = None,
        on_end: Callable[[Measurement], object] | None = None,
    ) -> None:
        if not isinstance(name, str):
            raise TypeError("write @eadt.measure() with parentheses, or eadt.measure('name')")
        self._name = name
        self._gpus = _visible_gpus(os.environ) if gpus is None else [str(gpu) for gpu in gpus]
        self._on_end = on_end
        self._open: _Window | None = None

    def __enter__(self) -> Measurement:
        """Begin."""
        if self._open is not None:
            raise RuntimeError("this window is open already: nested blocks need an eadt.measure() each")
        self._open = _Window(self._name, self._gpus)
        return self._open.measurement

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End; an exception passes through."""
        window, self._open = self._open, None
        if window is not None:
            window.close()
            self._hand_over(window.measurement)

    def __call__(self, function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        """Measure each call. The newest 1000 are in the function's ``measurements``, oldest first."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function.__qualname__} is a generator: it works while others loop over it; "
                "put the loop into a `with eadt.measure()` block"
            )
        name = self._name or getattr(function, "__qualname__", "")
        kept: deque[Measurement] = deque(maxlen=_NUM_KEPT)

        def another() -> measure:
            return measure(name, gpus=self._gpus, on_end=keep)

        def keep(measurement: Measurement) -> None:
            kept.append(measurement)
            self._hand_over(measurement)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def measured_coroutine(*args: Any, **keywords: Any) -> Any:
                with another():
                    return await function(*args, **keywords)

            measured = cast("Callable[_Parameters, _Result]", measured_coroutine)
        else:

            @functools.wraps(function)
            def measured_call(*args: _Parameters.args, **keywords: _Parameters.kwargs) -> _Result:
                with another():
                    return function(*args, **keywords)

            measured = measured_call
        measured.measurements = kept  # type: ignore[attr-defined]
        return measured

    def _hand_over(self, measurement: Measurement) -> None:
        logger.debug("%s", measurement)
        if self._on_end is not None:
            try:
                self._on_end(measurement)
            except Exception:
                logger.exception("what was to be done with a measurement failed")


class _Window:
    """One window, open from its making to :meth:`close`. Neither raises."""

    def __init__(self, name: str, gpus: Collection[str] | None) -> None:
        self.measurement = Measurement(name)
        self._gpus = gpus
        self._shared = _shared
        self._pid = os.getpid()
        self._begun_s = self._shared.clock.monotonic_s()
        self._meter: Meter | None = None
        self._points: dict[str, Point] = {}
        try:
            self._meter = self._shared.begin()
            self._begun_s, self._points = self._meter.cut()
        except Exception as error:
            self._say_failure(error)

    def close(self) -> None:
        """Fill the measurement."""
        measurement, meter = self.measurement, self._meter
        measurement.seconds = self._shared.clock.monotonic_s() - self._begun_s
        if self._pid != os.getpid():
            measurement.notes.append("the process was forked inside the window, and only the parent measures")
            return
        if meter is None:
            return
        try:
            if self._points:
                ended_s, points = meter.cut()
                measurement.seconds = ended_s - self._begun_s
                _fill(measurement, meter, self._points, points, self._gpus)
        except Exception as error:
            self._say_failure(error)
        finally:
            self._shared.end()

    def _say_failure(self, error: Exception) -> None:
        logger.debug("measuring failed", exc_info=error)
        self.measurement.notes.append(f"measuring failed: {error}")


def _fill(
    measurement: Measurement,
    meter: Meter,
    begun: Mapping[str, Point],
    ended: Mapping[str, Point],
    gpus: Collection[str] | None,
) -> None:
    seconds = measurement.seconds
    assert seconds is not None
    components = [part for part in meter.components if part.name in begun and _is_counted(part, gpus)]
    unknown_s, uncertainties = 0.0, []
    too_short: list[Component] = []
    for component in components:
        name = component.name
        before, after = begun[name], ended[name]
        known_s = after.known_s - before.known_s
        unknown_s += max(seconds - known_s, 0.0)
        if known_s <= 0.0 or component.quality is None:
            measurement.by_component[name] = None
            measurement.notes.append(_about(name, after.why_unknown or "the window has no length"))
            continue
        energy_j = after.energy_j - before.energy_j
        stale = [Quality.STALE] if Quality.STALE in (before.quality, after.quality) else []
        why = after.why_unknown or "it did not answer meanwhile"
        if known_s > (1.0 + _AT_LEAST_FRACTION) * seconds:
            # It was silent before the window and told afterwards: the window's part of that by its time.
            energy_j *= seconds / known_s
            stale = [Quality.STALE]
            measurement.notes.append(f"{name} was silent before the window: its energy is a share by time")
        elif known_s < (1.0 - _AT_LEAST_FRACTION) * seconds:
            measurement.notes.append(f"{name} is known for {_length(known_s)} only: {why}")
        measurement.by_component[name] = energy_j
        measurement.qualities[name] = Quality.worst([*stale, component.quality])
        if seconds < component.honest_window_s:
            too_short.append(component)
        uncertainties.append(_uncertainty_j(component, meter, energy_j, seconds))
    known = [energy_j for energy_j in measurement.by_component.values() if energy_j is not None]
    if not known:
        if not components:
            measurement.notes.append("there is nothing to measure here")
        return
    measurement.energy_j = sum(known)
    measurement.quality = Quality.worst(measurement.qualities.values())
    unknown_fraction = unknown_s / (seconds * len(components))
    measurement.at_least = unknown_fraction > _AT_LEAST_FRACTION
    if unknown_fraction <= _MEAN_POWER_FRACTION:
        measurement.mean_power_w = measurement.energy_j / seconds
    stated = [uncertainty for uncertainty in uncertainties if uncertainty is not None]
    if len(stated) == len(uncertainties):
        measurement.uncertainty_j = hypot(*stated)
    if too_short:
        names = ", ".join(component.name for component in too_short)
        longest_s = max(component.honest_window_s for component in too_short)
        measurement.notes.append(
            f"{_length(seconds)} is shorter than the {longest_s:g} s from which {names} can be "
            "trusted: repeat the work inside one window"
        )


def _length(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 0.1 else format_duration(seconds)


def _about(name: str, why: str) -> str:
    """The detail of what nothing can measure begins with its name itself."""
    return why if why.startswith(f"{name}:") else f"{name}: its energy is unknown: {why}"


def _uncertainty_j(component: Component, meter: Meter, energy_j: float, seconds: float) -> float | None:
    """The source's stated error, and at both ends the energy that it cannot tell to be in or out."""
    if component.relative_uncertainty is None:
        return None
    powers_w = [energy_j / seconds]
    if seconds < component.honest_window_s:
        # A counter that has not stepped yet says 0: what it drew before, or can draw, says more.
        before = meter.mean_power_w([component.name], component.honest_window_s)
        if before is not None:
            powers_w.append(before[0])
        elif component.greatest_power_w is not None:
            powers_w.append(component.greatest_power_w)
    edge_j = max(powers_w) * component.resolution_s
    return hypot(component.relative_uncertainty * energy_j, sqrt(2.0) * edge_j)


def _visible_gpus(environment: Mapping[str, str]) -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES allows; ``None``: everything."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    return [item.strip() for item in visible.split(",") if item.strip()]


def _is_counted(component: Component, gpus: Collection[str] | None) -> bool:
    if not component.is_gpu or gpus is None:
        return True
    # CUDA takes the beginning of a UUID for all of it.
    return any(
        component.name == f"gpu{item}" or (not item.isdigit() and component.identity.startswith(item))
        for item in gpus
    )
