"""Run under torch.distributed.run: sharded ranks send to two servers, one of which fails half way."""

import os
import sys

import torch
from accelerate.utils import broadcast_object_list
from test_broadcast import Recording, fails, hangs
from test_learner_gradients import learner, sequences

from rlkit.algorithms.aggregation import SequenceMeanTokenMean
from rlkit.algorithms.kl import NoKL
from rlkit.algorithms.losses.clipped import ClippedLoss
from rlkit.algorithms.old_policy import RolloutAnchor
from rlkit.buffer.sql import SqlBuffer
from rlkit.config.schema import LearnerConfig
from rlkit.learner.broadcast import Broadcast
from rlkit.learner.update import Objective, never_stop

objective = Objective(loss=ClippedLoss(), aggregation=SequenceMeanTokenMean(), kl=NoKL(), old_policy=RolloutAnchor())
it = learner(torch.float32, objective, LearnerConfig(sharded=True, max_tokens_per_microbatch=60))
assert it.sharded
whole = learner(torch.float32, objective).model
folder, data = sys.argv[1], sequences(torch.float32)
if it.accelerator.is_main_process:
    buffer = SqlBuffer(
        f"sqlite:///{folder}/b.db", payload_dir=folder, run="run", prompts_per_step=1, max_staleness=0, slice_samples=1
    )
    log, plan = [], {("http://b", 1): fails, ("http://c", 2): hangs}
    buffer.report("worker", {}, ["http://a", "http://b", "http://c"])
    broadcast = Broadcast(buffer, it, Recording(log, plan, 5.0), 30.0)
    broadcast.serve(0)
    assert [x[:2] for x in log] == [("http://a", 0), ("http://b", 0), ("http://c", 0)]
    for _, _, got in log:
        assert all(torch.equal(got[name], p) for name, p in whole.named_parameters()) and len(got) > 5
    broadcast.serve(1)
    broadcast.serve(2)
    kept = [x[:2] for x in log[3:]]
    assert kept == [("http://a", 1), ("http://b", "closed"), ("http://c", 1), ("http://a", 2), ("http://c", "closed")]
    broadcast_object_list([None], from_process=0)
else:
    orders = 0
    while (work := broadcast_object_list([None], from_process=0)[0]) is not None:
        work(it)
        orders += 1
    assert orders == 8  # three servers twice, then those that had not failed
metrics = it.step(data, never_stop)  # nobody is left behind in a collective
assert metrics["policy/grad_norm"] > 0
if it.accelerator.is_main_process:
    print("every rank took part", flush=True)
it.accelerator.end_training()
os._exit(0)
