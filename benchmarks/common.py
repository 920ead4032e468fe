"""What the benchmarks share: models, configurations, one Ray cluster, hardware and versions, quantiles."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from eadt.config import RunConfig

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("eadt", "ray", "torch", "deepspeed", "transformers", "numpy", "psutil")


@dataclass(frozen=True)
class Workload:
    """What is trained: a GPT-NeoX on the standard library's sources, byte by byte.

    Attributes:
        hidden_size: Width; attention heads are 64 wide.
        num_layers: Depth.
        sequence_length: Tokens a sample.
        train_batch_size: Samples an optimizer step, whole job.
        micro_batch: Most samples of one forward pass.
        vocab_size: Rows of the embedding; ``None`` for as many as the byte tokenizer needs.
    """

    hidden_size: int
    num_layers: int
    sequence_length: int = 64
    train_batch_size: int = 8
    micro_batch: int = 4
    vocab_size: int | None = None

    def training(self) -> dict[str, Any]:
        """The configuration's ``training`` section."""
        return {
            "model_config": {
                "model_type": "gpt_neox",
                "hidden_size": self.hidden_size,
                "num_hidden_layers": self.num_layers,
                "num_attention_heads": max(1, self.hidden_size // 64),
                "intermediate_size": 4 * self.hidden_size,
                "max_position_embeddings": max(512, self.sequence_length),
                **({} if self.vocab_size is None else {"vocab_size": self.vocab_size}),
            },
            "tokenizer_name_or_path": "byte",
            "dataset_path": "python-stdlib",
            "sequence_length": self.sequence_length,
            "train_batch_size": self.train_batch_size,
            "per_device_train_batch_size": self.micro_batch,
            "max_steps": 1_000_000,  # the benchmark ends the run
            "eval_batches": 1,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "precision": "fp32",
        }


WORKLOADS = {
    "1M": Workload(128, 5),
    "3M": Workload(256, 4),
    "10M": Workload(512, 3),
    "100M": Workload(768, 14, sequence_length=32, train_batch_size=2, micro_batch=1),
    "160M": Workload(768, 12, sequence_length=512, train_batch_size=16, micro_batch=8, vocab_size=50304),
}
"""By size: 1.05, 3.3, 9.7, 99.6 and 162 million parameters; the last is Pythia-160m's shape."""


def run_config(workload: Workload, folder: Path, name: str, *, zero_stage: int, **sections: Any) -> RunConfig:
    """A run of EADT on at most two workers, its supervisor off unless ``sections`` says otherwise.

    Args:
        workload: What is trained.
        folder: Where the run's folder goes.
        name: The run's name.
        zero_stage: DeepSpeed's.
        **sections: Further sections of the configuration; ``training`` is merged into the workload's.
    """
    values: dict[str, Any] = {
        "run": {"name": name, "folder": str(folder / name)},
        "deepspeed": {"zero_optimization": {"stage": zero_stage}},
        "mps": {"initial_thread_percentage": 50, "shared_resources": 2},
        "supervisor": {"enabled": False},
        "policy": {"max_workers_per_gpu": 2},
        "report": {"formats": ["json"]},
        **sections,
    }
    values["elastic"] = {"num_workers": 2, "max_workers": 2, **sections.get("elastic", {})}
    values["checkpoint"] = {"save_final_model": False, **sections.get("checkpoint", {})}
    values["resources"] = {"training_cores_per_node": 2, **sections.get("resources", {})}
    values["training"] = {**workload.training(), **sections.get("training", {})}
    return RunConfig.model_validate(values)


@contextlib.contextmanager
def ray_cluster(num_cpus: int | None = None, num_gpus: int | None = None) -> Iterator[None]:
    """One local Ray cluster, that every way of the benchmark uses."""
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        namespace="eadt",
        object_store_memory=200_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    # Ray Train's helpers look for "the" cluster, and fail where a machine has several.
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        ray.shutdown()
        os.environ.pop("RAY_ADDRESS", None)


def say(text: str) -> None:
    """Progress, for people; the result alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def quantile(values: Sequence[float], fraction: float) -> float:
    """Quantile with linear interpolation between the ordered values."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def bootstrap_ci(values: Sequence[float], num_draws: int = 4000) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` by resampling them; equal values give equal intervals."""
    draw = random.Random(0)
    means = [statistics.fmean(draw.choices(values, k=len(values))) for _ in range(num_draws)]
    return quantile(means, 0.025), quantile(means, 0.975)


def hardware() -> dict[str, Any]:
    """The machine, with its load before the benchmark."""
    model = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": model,
        "num_cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "memory_bytes": psutil.virtual_memory().total,
        "machine": platform.machine(),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    """Versions of what determines the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def add_output_options(parser: argparse.ArgumentParser, result: Path) -> None:
    """``--json`` and ``--save``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--save", action="store_true", help=f"write the JSON to results/{result.name}")


def output(result: dict[str, Any], table: str, arguments: argparse.Namespace, path: Path) -> None:
    """Print, and save where asked to."""
    print(json.dumps(result) if arguments.json else table)
    if arguments.save:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result) + "\n")
