"""reasoning-gym's own scorers. Several of them evaluate model output: use `VerifierPool`."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.base import RewardError, Sample, Unscorable, nearest
from rewards.extraction import check_extraction, extract


@dataclass(frozen=True, slots=True)
class ReasoningGym:
    """The score in [0, 1] that the task's data set gives the extracted answer.

    task: name of a task, a list of names, or a mapping of names to the data set's settings; extract, marker: where the
    answer stands. What becomes of several tasks, missing answers and exceptions: docs/rewards.md. The entry's question
    is metadata["question"] or else the prompt.
    """

    bounds = (0.0, 1.0)
    task: str | Sequence[str] | Mapping[str, Mapping[str, Any]]
    extract: str = "tag"
    marker: str = ""

    def __post_init__(self) -> None:
        check_extraction(self.extract, self.marker)
        if not self._settings():
            raise RewardError("task is empty; name a reasoning-gym task, e.g. task: chain_sum")

    def warm_up(self) -> None:
        """Build every task's data set and check that it scores its own reference after JSON."""
        for name, settings in self._settings().items():
            _load(name, json.dumps(settings))

    def __call__(self, sample: Sample) -> float:
        found = self.answer(sample)
        if found is None:
            return 0.0
        if sample.reference is None:
            raise Unscorable("no reference")
        tasks = self._settings()
        name = sample.metadata.get("source_dataset") if len(tasks) > 1 else next(iter(tasks))
        if name not in tasks:
            raise Unscorable(f"metadata['source_dataset'] is {name!r}, expected one of: {', '.join(tasks)}")
        dataset, tuples = _load(name, json.dumps(tasks[name]))
        question = sample.metadata.get("question", sample.prompt)
        metadata = _tuples(sample.metadata) if tuples else dict(sample.metadata)
        entry = {"question": question, "answer": sample.reference, "metadata": metadata}
        return float(dataset.score_answer(found, entry))

    def answer(self, sample: Sample) -> str | None:
        """The extracted answer, as the model wrote it."""
        return extract(sample.completion, self.extract, self.marker)

    def _settings(self) -> dict[str, Mapping[str, Any]]:
        if isinstance(self.task, Mapping):
            return dict(self.task)
        names = [self.task] if self.task and isinstance(self.task, str) else self.task
        return dict.fromkeys(names, {})


@functools.cache
def _load(name: str, settings: str) -> tuple[Any, bool]:
    """The task's data set of `settings` (JSON), and whether its scorer needs back the tuples JSON turned into lists."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise RewardError(f"task={name!r} is no reasoning-gym task; {nearest(name, DATASETS)}")
    try:
        dataset = reasoning_gym.create_dataset(name, **{"seed": 0, **json.loads(settings)})
        entry = dataset[0]
    except Exception as error:  # each task checks its settings by an error of its own kind
        raise RewardError(f"task={name!r} with {settings} cannot be built: {error}") from error
    expected = dataset.score_answer(entry["answer"], entry)
    # Keys and scalars of numpy types become plain text: what a data file would hold.
    returned = json.loads(json.dumps(entry, default=str))
    problem = "its score differs"
    for tuples in (False, True):
        candidate = {**returned, "metadata": _tuples(returned["metadata"])} if tuples else returned
        try:
            if dataset.score_answer(entry["answer"], candidate) == expected:
                return dataset, tuples
        except Exception as error:  # this reading of the entry is not the scorer's
            problem = f"{type(error).__name__}: {error}"
    raise RewardError(f"task={name!r}: its scorer takes no entry stored as JSON ({problem}); choose another task")


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    return value
