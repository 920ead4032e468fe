"""The private names of DeepSpeed by which state is read and written are there in each ZeRO stage.

Real: DeepSpeed, in an engine process of its own as in a run (ZeRO's process-wide state must not leak between
stages). ``eadt.training.zero_state`` is what depends on them.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys
os.environ.update(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", CUDA_VISIBLE_DEVICES="")
import torch, deepspeed, logging
import torch.distributed as dist
from deepspeed.utils import logger
logger.setLevel(logging.ERROR)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
stage = int(sys.argv[1])
store = torch.distributed.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
deepspeed.init_distributed(dist_init_required=False, verbose=False, auto_mpi_discovery=False)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
engine, *_ = deepspeed.initialize(
    model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), dist_init_required=False,
    config={"train_batch_size": 2, "zero_optimization": {"stage": stage}, "steps_per_print": 1000000})
loss = engine(torch.ones(2, 4)).square().mean()
engine.backward(loss)
engine.step()
zero = engine.optimizer
param = next(engine.module.parameters())
found = {"stage": engine.zero_optimization_stage(), "wrapper": type(zero).__name__}
if stage == 3:
    group, position, size = zero.grad_position[zero.get_param_id(param)]
    flat = zero.fp32_partitioned_groups_flat[group]
    state = zero.optimizer.state[flat]
    found.update(psz=param.ds_tensor.numel(), numel=param.ds_numel, size=size, shape=list(param.ds_shape),
                 moments=sorted(state), status=param.ds_status.name)
elif stage in (1, 2):
    mapping = param._hp_mapping
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    state = zero.optimizer.state[flat]
    found.update(lp=[mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel],
                 hp=mapping.hp_fragment_address.numel, moments=sorted(state),
                 linked=zero._hp_optimizer_states_linked, keys=sorted(mapping.get_optim_state_keys()))
else:
    found.update(moments=sorted(zero.state[param]))
print(json.dumps(found))
"""


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_is_where_zero_state_looks_for_it(stage: int) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(stage)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["stage"] == stage
    assert set(found["moments"]) >= {"exp_avg", "exp_avg_sq", "step"}
    if stage == 3:
        assert found["psz"] == found["numel"] == found["size"] == 32
        assert found["shape"] == [8, 4]
        assert found["status"] in ("AVAILABLE", "NOT_AVAILABLE")
    elif stage in (1, 2):
        assert found["lp"] == [0, 32]
        assert found["hp"] == 32
        assert found["linked"] is True
        assert found["keys"] == ["exp_avg", "exp_avg_sq"]
