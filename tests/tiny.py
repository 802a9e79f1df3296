"""Overrides that make the quickstart a matter of seconds, for tests of whole runs."""

TINY = [
    "recipe=quickstart",
    "sft.steps=8",
    "sft.data.source.size=256",
    "data.train.source.size=64",
    "data.eval.heldout.source.size=8",
    "prompts_per_step=4",
    "samples_per_prompt=4",
    "rollout.max_completion_tokens=12",
    "learner.deterministic=true",
    "learner.num_threads=1",
    "telemetry.report=false",
    "evaluation.every_steps=0",
]
