"""What goes with what: every allowed pair runs, every refused one is refused with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from combos import GROUPS, RULES, allowed, broken, choices, covering, markdown, pairs, pieces
from tiny import TINY

from rlkit.cli import main
from rlkit.config.compose import load
from rlkit.config.verify import verify
from rlkit.errors import ConfigError

ROOT = Path(__file__).parents[2]
COVERING = covering()
# Held-out figures come from the verifiers, where there are any.
TASK = {"chain_sum_noisy": ["evaluation.part=clean"]}
MARKS = ["reward.likelihood.delimiter='#'", "reward.likelihood.opening=''", "reward.likelihood.closing='<eos>'"]


def overrides(combination: tuple[str, ...]) -> list[str]:
    chosen = [f"{group}={option}" for group, option in zip(GROUPS.values(), combination, strict=True)]
    likelihood = choices()["reward"][combination[0]].likelihood is not None
    return [*chosen, *TASK.get(combination[0], []), *(MARKS if likelihood else [])]


def test_the_page_is_up_to_date():
    written = (ROOT / "docs" / "combinations.md").read_text()
    assert written == markdown(), "run: PYTHONPATH=tests python -m combos > docs/combinations.md"


def test_every_choice_is_allowed_somewhere_and_covered():
    good = {pair for combination, ok in allowed().items() if ok for pair in pairs(combination)}
    assert {one for pair in good for one in pair} == {
        (kind, option) for kind in choices() for option in choices()[kind]
    }
    assert {pair for combination in COVERING for pair in pairs(combination)} == good


def test_every_refused_combination_is_refused_with_its_reason():
    """One for every set of broken rules: the others differ in names that no rule reads."""
    examples = {tuple(broken(pieces(c))): c for c, ok in allowed().items() if not ok}
    assert len(examples) > 5
    for rules, combination in examples.items():
        config, _ = load("quickstart", overrides(combination))
        with pytest.raises(ConfigError) as caught:
            verify(config)
        assert all(rule.reason in str(caught.value) and rule.fix in str(caught.value) for rule in rules)


def test_every_rule_is_broken_by_some_combination_or_option():
    by_choice = {rule.reason for c, ok in allowed().items() if not ok for rule in broken(pieces(c))}
    of_settings = {rule.reason for rule in RULES} - by_choice
    assert {reason.split(",")[0] for reason in of_settings} == {
        "a KL in the reward gives both signs to answers that are all wrong",
        "this advantage needs scores with nothing taken off",
        "it would see scores without the likelihoods",
        "this advantage learns from groups of one verdict too",
        "the scores must be log-likelihoods and nothing else",
        "what this advantage estimates from does not record appeals",
    }


@pytest.mark.parametrize("more", ["weight=0.5", "length_reward=1", "subtract_no_chain=true"])
def test_jepo_takes_log_likelihoods_and_nothing_else(more):
    clipped = ["reward.likelihood.answer_gradient=false"]  # which alone may go with a clipped difference
    config, _ = load("quickstart_likelihood", ["reward=jepo", "algorithm=jepo", *clipped])
    verify(config)
    config, _ = load("quickstart_likelihood", ["reward=jepo", "algorithm=jepo", *clipped, f"reward.likelihood.{more}"])
    with pytest.raises(ConfigError, match="log-likelihoods and nothing else"):
        verify(config)


def test_an_estimate_is_of_appeals():
    """Of other verdicts, or of appeals already granted, it would come to 1 without a word."""
    appeal = "rule: '${reward.rewards.correct}', appeal: '${reward.rewards.clean}'"
    appeal = f"+reward.rewards.appeal={{_target_: rewards.noise_injection.Appeals, weight: 0, {appeal}}}"
    for estimate, more, good in (("appeal", [], True), ("clean", [], False), ("appeal", ["flip=true"], False)):
        flips = [f"+reward.rewards.appeal.{one}" for one in more]
        config, _ = load(
            "quickstart_noise", ["algorithm=noise_forward", f"algorithm.advantage.estimate={estimate}", appeal, *flips]
        )
        if good:
            verify(config)
            continue
        with pytest.raises(ConfigError, match="does not record appeals"):
            verify(config)


@pytest.mark.slow
@pytest.mark.parametrize("combination", COVERING, ids="-".join)
def test_two_steps(combination, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "combinations"
    quiet = ["telemetry.console=false", "telemetry.save_rollouts=false", "evaluation.at_start=false", "data.eval={}"]
    places = [f"output_dir={folder}", f"sft.cache_dir={folder}/cache", f"name={'-'.join(combination)}"]
    settings = [*TINY, *overrides(combination), *places, *quiet, "steps=2", "samples_per_prompt=4"]
    assert main(["train", *settings]) == 0
