"""Run under torch.distributed.run: one update's gradient over however many ranks, written by rank 0."""

import os
import sys

import torch
from safetensors.torch import save_file
from test_learner_gradients import labelled, learner, sequences
from test_learner_likelihood import REWARDS, training_set
from test_learner_likelihood import learner as likelihood_learner

from rlkit.algorithms.aggregation import SequenceMeanTokenMean
from rlkit.algorithms.kl import NoKL
from rlkit.algorithms.losses.clipped import ClippedLoss
from rlkit.algorithms.losses.real import Real
from rlkit.algorithms.old_policy import RolloutAnchor
from rlkit.learner.update import Meter, Objective, never_stop

dtype = {"float32": torch.float32, "float64": torch.float64}[sys.argv[1]]
if sys.argv[3] == "likelihood":
    it = likelihood_learner(REWARDS[0])
    data = training_set(REWARDS[0], it)
else:
    loss, make = {"tokens": (ClippedLoss(), sequences), "groups": (Real(), labelled)}[sys.argv[3]]
    objective = Objective(loss=loss, aggregation=SequenceMeanTokenMean(), kl=NoKL(), old_policy=RolloutAnchor())
    it, data = learner(dtype, objective), make(dtype)
assert it.accelerator.num_processes == int(os.environ["WORLD_SIZE"])
it.config.max_tokens_per_microbatch = 40
[micro] = it.anchored([it.microbatches(data, range(len(data)))])
micro = it.with_slopes(micro, data, range(len(data)), Meter())
it.accumulate(micro, Meter(), never_stop, first=True)
if it.accelerator.is_main_process:
    flat = torch.cat([p.grad.flatten() for p in it.policy.parameters()])
    save_file({"gradient": flat}, sys.argv[2])
it.accelerator.end_training()
os._exit(0)  # as rlkit.cli.run does: threads of gloo abort some interpreters on their way out
