"""Composition: what a recipe and overrides come to, and that nothing misspelt passes."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rlkit.config import keys
from rlkit.config.compose import load
from rlkit.config.schema import Config
from rlkit.errors import ConfigError

Write = Callable[[str, str], Path]
Smoke = Callable[..., Config]
Refused = Callable[..., AbstractContextManager[None]]


def test_result_is_typed_and_plain(rows: Path) -> None:
    config, plain = load("gsm8k_smoke", [f"data.train.path={rows}", "seed=7"])
    assert isinstance(config, Config) and config.seed == plain["seed"] == 7
    assert config.data.train.source == {"_target_": "rlkit.data.sources.LocalFile", "path": str(rows)}
    assert OmegaConf.merge(OmegaConf.structured(Config), plain) == OmegaConf.structured(config)


def test_options_and_values_can_be_overridden(smoke: Smoke) -> None:
    config = smoke(
        "algorithm=dr_grpo",
        "algorithm/loss=clip_higher",
        "algorithm.loss.clip_low=0.1",
        "algorithm.loss.dual_clip=3",
        "learner.betas=[0.8,0.9]",
        "reward.rewards.short={_target_: rewards.format.Format, tags: [answer], weight: 0.1}",
    )
    assert config.algorithm.advantage["_target_"].endswith("MeanCentredAdvantage")
    assert config.algorithm.aggregation["max_length"] == config.rollout.max_completion_tokens
    assert config.algorithm.loss == {
        "_target_": "rlkit.algorithms.losses.clipped.ClippedLoss",
        "clip_low": 0.1,
        "clip_high": 0.28,
        "dual_clip": 3,
    }
    assert config.learner.betas == [0.8, 0.9]
    assert set(config.reward.rewards) == {"correct", "short"}


def test_later_overrides_win(smoke: Smoke) -> None:
    assert smoke("steps=4", "steps=9").steps == 9


def test_two_options_of_a_group_are_refused(smoke: Smoke, refused: Refused) -> None:
    with refused("two options of one group", "algorithm=dapo", "algorithm=dr_grpo"):
        smoke("algorithm=dapo", "seed=1", "algorithm=dr_grpo")


def test_whole_component_replaces(smoke: Smoke) -> None:
    config = smoke("algorithm.loss={_target_: mine.Loss, width: 3}")
    assert config.algorithm.loss == {"_target_": "mine.Loss", "width": 3}


def test_deletion_of_a_component_setting(smoke: Smoke, refused: Refused) -> None:
    assert "dual_clip" not in smoke("~algorithm.loss.dual_clip").algorithm.loss
    with refused("nothing to delete", "dual_clip"):
        smoke("~algorithm.loss.dual_clop")
    with refused("'~seed'", "can be deleted"):
        smoke("~seed")


def test_sections_that_were_null_can_be_filled_and_emptied(refused: Refused) -> None:
    assert load("quickstart", ["sft=null"])[0].sft is None
    again = load("quickstart", ["sft.steps=3"])[0].sft
    assert again is not None and again.steps == 3
    with refused("sft.data.source", "sft.data.path=FILE"):
        load("gsm8k", ["sft.steps=3"])


def test_new_held_out_set(rows: Path) -> None:
    config, _ = load("quickstart", [f"data.eval.mine.path={rows}"])
    assert config.data.eval["mine"].source["path"] == str(rows)
    assert set(config.data.eval) == {"heldout", "mine"}


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("stepz=3", "'steps'"),
        ("+stepz=3", "'steps'"),
        ("++stepz=3", "'steps'"),
        ("learner.learning_rat=1e-4", "'learner.learning_rate'"),
        ("learning_rate=1e-4", "'learner.learning_rate'"),
        ("rollout.betas=[1]", "'learner.betas'"),
        ("data.train.pth=x", "'data.train.path'"),
        ("data.eval.mine.lim=2", "'data.eval.mine.limit'"),
        ("algoritm=grpo", "'algorithm'"),
        ("algorithm=grpoo", "'grpo'"),
        ("algorithm/los=clipped", "'algorithm/loss'"),
        ("+algorithm/los=clipped", "'algorithm/loss'"),
        ("algorithm/loss=cliped", "'clipped'"),
        ("steps.more=3", "steps is integer"),
        ("hydra.run.dir=x", "no such key"),
    ],
)
def test_misspelt_override(smoke: Smoke, override: str, nearest: str, refused: Refused) -> None:
    with refused(nearest, repr(override), override.lstrip("+").partition("=")[0]):
        smoke(override)


@given(st.sampled_from([path for path, _ in keys.walk() if "*" not in path]), st.data())
def test_every_key_of_the_schema_resists_a_typo(path: str, data: st.DataObject) -> None:
    section, _, name = path.rpartition(".")
    at = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    typo = f"{section}.{name[:at]}{letter}{name[at + 1 :]}".lstrip(".")
    siblings = dict(keys.walk())
    if typo in siblings:
        keys.locate(typo)
    else:
        with pytest.raises(ConfigError, match="no such key"):
            keys.locate(typo)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=x", "integer"),
        ("steps=2.5", "integer"),
        ("steps=null", "integer"),
        ("learner.learning_rate=fast", "number"),
        ("learner.deterministic=perhaps", "true or false"),
        ("learner.betas=0.9", "list of number"),
        ("budget=null", "component"),
        ("learner={betas: [a, b]}", "list of number"),
    ],
)
def test_wrong_type(smoke: Smoke, override: str, expected: str, refused: Refused) -> None:
    with refused("wrong type", f"expected: {expected}", override):
        smoke(override)


@pytest.mark.parametrize("override", ["a=[", "steps=1,2", "steps@x=3", "algorithm/loss=null"])
def test_malformed_override(smoke: Smoke, override: str, refused: Refused) -> None:
    with refused(override.partition("=")[0].partition("@")[0]):
        smoke(override)


def test_unknown_recipe_names_the_nearest_and_all(refused: Refused) -> None:
    with refused("Did you mean 'quickstart'?", "gsm8k_smoke"):
        load("quikstart")
    for path in ("../quickstart", "/etc/passwd", "quickstart.yaml"):
        with refused("no such"):
            load(path)


def test_missing_mandatory_value_says_how_to_give_it(refused: Refused) -> None:
    with refused("data.train.source", "data.train.path=FILE"):
        load("gsm8k_smoke")


def test_interpolation_that_leads_nowhere(smoke: Smoke, refused: Refused) -> None:
    with refused("name", "nope"):
        smoke("name=${nope}")


def test_own_recipe_extends_a_shipped_one(write: Write, library: Path, rows: Path) -> None:
    write("algorithm/loss/wide", "_target_: mine.Loss\nclip: 0.4\n")
    write(
        "mine",
        f"""
        defaults:
          - gsm8k_smoke
          - override algorithm: dapo
          - override algorithm/loss: wide
          - _self_
        steps: 11
        data: {{train: {{path: {rows}}}}}
        """,
    )
    config, _ = load("mine", ["prompts_per_step=6"], library)
    assert (config.steps, config.prompts_per_step) == (11, 6)
    assert config.algorithm.loss == {"_target_": "mine.Loss", "clip": 0.4}
    assert config.algorithm.aggregation["_target_"].endswith("TokenMean")
    assert load("mine", ["algorithm=grpo", "algorithm/loss=clipped"], library)[0].algorithm == (
        load("gsm8k_smoke", [f"data.train.path={rows}"])[0].algorithm
    )


def test_own_option_shadows_a_shipped_one(write: Write, library: Path) -> None:
    write("algorithm/loss/clipped", "_target_: mine.Loss\n")
    config, _ = load("quickstart", [], library)
    assert config.algorithm.loss == {"_target_": "mine.Loss"}


def test_own_folder_must_exist(tmp_path: Path, refused: Refused) -> None:
    with refused("--config-dir", "no such folder"):
        load("quickstart", [], tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stepz: 3", ("stepz", "Did you mean 'steps'?")),
        ("learner: {beta: [0.9, 0.95]}", ("learner.beta", "'learner.betas'")),
        ("steps: many", ("wrong type", "'many'", "integer")),
        ("learner: 3", ("int is not a subclass of LearnerConfig", "value: 3")),
        ("steps: [", ("cannot be read", "while parsing")),
        ("- steps", ("Cannot merge DictConfig with ListConfig",)),
        ("defaults: {algorithm: grpo}", ("must be a list",)),
        ("defaults: [algoritm: grpo]", ("no such config group", "'algorithm'")),
        ("defaults: [algorithm: grop]", ("no such option", "'grpo'")),
        ("defaults: [quickstart, overide algorithm: dapo]", ("use 'override algorithm: dapo'",)),
        ("defaults: [quickstart, override algorithm: grop]", ("no such option", "'grpo'")),
        ("defaults: [quickstart, override algorithm/los: x]", ("'algorithm/los'", "No match")),
        ("defaults: [quikstart]", ("no such recipe", "'quickstart'")),
        ("defaults: [algorithm/grop]", ("no such option", "'grpo'")),
        ("defaults: [{algorithm: grpo, data: gsm8k}]", ("Too many keys",)),
        ("defaults: [{override algorithm: dapo}]", ("algorithm", "Could not override")),
        ("defaults: [mine]", ("includes itself", "'mine'")),
    ],
)
def test_fault_in_a_recipe_file(
    write: Write, library: Path, text: str, parts: tuple[str, ...], refused: Refused
) -> None:
    path = write("mine", text)
    # Of a wrong override of an entry, Hydra names the file that has the entry.
    where = () if "itself" in parts[0] or "quickstart, override algorithm: " in text else (str(path),)
    with refused(*parts, *where):
        load("mine", [], library)


def test_fault_in_an_option_names_its_file(write: Write, library: Path, refused: Refused) -> None:
    path = write("learner/own", "learning_rat: 3\n")
    with refused(str(path), "'learner.learning_rate'"):
        load("quickstart", ["learner=own"], library)
    nested = write("algorithm/own", "defaults: [loss: cliped]\n")
    with refused(str(nested), "'clipped'"):
        load("quickstart", ["algorithm=own"], library)


def test_schema_holds_whatever_the_defaults_list_says(write: Write, library: Path, refused: Refused) -> None:
    write("bare", "surprise: 1\n")
    write("mine", "defaults: [bare@extra.deep]\n")
    with refused("extra", "no such key"):
        load("mine", [], library)


def test_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_text("stray: true\n")
    config, _ = load("quickstart", [f"data.train.path={os.path.relpath(rows)}"])
    assert Path(config.data.train.source["path"]).is_file()
