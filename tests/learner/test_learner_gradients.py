"""The gradient of an update does not depend on how it is cut: design.md section 7, cross-cutting pitfall 3."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import example, given
from hypothesis import strategies as st

from rlkit.algorithms.advantages.dr_grpo import MeanCentredAdvantage
from rlkit.algorithms.advantages.grpo import GroupNormalizedAdvantage
from rlkit.algorithms.aggregation import ConstantLength, PromptMean, SequenceMeanTokenMean, TokenMean
from rlkit.algorithms.base import AdvantageInputs, LossInputs
from rlkit.algorithms.kl import KLInReward, KLPenalty, NoKL
from rlkit.algorithms.losses.cispo import ClippedImportanceLoss
from rlkit.algorithms.losses.clipped import ClippedLoss
from rlkit.algorithms.losses.gspo import SequenceClippedLoss
from rlkit.algorithms.losses.policy_gradient import PolicyGradientLoss
from rlkit.algorithms.losses.real import Real, RealBce, RealProduct
from rlkit.algorithms.old_policy import RecomputeAnchor, RolloutAnchor
from rlkit.config.schema import LearnerConfig, ModelConfig
from rlkit.errors import TrainingError
from rlkit.learner.batching import TrainingSequence, collate, plan_microbatches, share_of_rank, split_groups
from rlkit.learner.model import load_model, load_tokenizer
from rlkit.learner.policy import Policy
from rlkit.learner.update import Learner, Meter, Objective, never_stop

MODEL = ModelConfig(
    architecture={
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    alphabet="0123456789+=",
)


# Llama's norms compute in float32, where sums in another order round differently; GPT-2's do not.
GPT2 = dataclasses.replace(
    MODEL,
    architecture={"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
)


def sequences(dtype: torch.dtype) -> list[TrainingSequence]:
    rng = np.random.default_rng(0)
    out = []
    for number in range(12):
        length = int(rng.integers(1, 14))
        mask = rng.random(length) < 0.8
        mask[0] = True
        out.append(
            TrainingSequence(
                prompt_token_ids=rng.integers(4, 16, int(rng.integers(1, 6))),
                token_ids=rng.integers(4, 16, length),
                behavior_logprobs=rng.normal(-2.7, 0.2, length).astype(np.float32),
                loss_mask=mask,
                group=number,
                advantage=float(rng.normal()),
            )
        )
    return out


def learner(
    dtype: torch.dtype, objective: Objective, config: LearnerConfig | None = None, source: ModelConfig = MODEL
) -> Learner:
    tokenizer = load_tokenizer(source)
    reference = None
    if objective.kl.needs_reference:
        frozen = load_model(source, tokenizer, dtype, 1).requires_grad_(False)
        reference = Policy(frozen, temperature=0.7, chunk_logits=40)
    policy = Policy(load_model(source, tokenizer, dtype, 0), temperature=0.7, chunk_logits=30)
    return Learner(policy, reference, objective, config or LearnerConfig(), Accelerator(cpu=True), 1)


def gradient(
    it: Learner, data: list[TrainingSequence], parts: list[list[int]], meter: Meter | None = None
) -> torch.Tensor:
    weights = it.weights(data, range(len(data)))
    [micro] = it.anchored([[collate(data, part, weights) for part in parts]])
    meter = meter or Meter()
    it.accumulate(it.with_slopes(micro, data, range(len(data)), meter), meter, never_stop, first=True)
    flat = torch.cat([p.grad.flatten() for p in it.policy.parameters()])
    it.optimizer.zero_grad(set_to_none=True)
    return flat.clone()


@pytest.mark.parametrize("aggregation", [TokenMean(), SequenceMeanTokenMean(), ConstantLength(16), PromptMean()])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kl", [NoKL(), KLPenalty(0.1)])
def test_gradient_is_the_same_for_every_split(aggregation, dtype, bound, kl):
    it = learner(
        dtype,
        Objective(
            loss=ClippedLoss(dual_clip=3.0),
            aggregation=aggregation,
            kl=kl,
            old_policy=RolloutAnchor(),
            entropy_coefficient=0.01,
        ),
    )
    data = sequences(dtype)
    whole = gradient(it, data, [list(range(len(data)))])
    assert whole.norm() > 0
    rng = np.random.default_rng(1)
    lengths = [s.total_tokens for s in data]
    splits = [plan_microbatches(lengths, n) for n in (1, 17, 40)]
    splits += [[[i] for i in rng.permutation(len(data)).tolist()]]
    splits += [[p.tolist() for p in np.array_split(rng.permutation(len(data)), 5)]]
    for split in splits:
        difference = (gradient(it, data, split) - whole).norm() / whole.norm()
        assert difference <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kl", [NoKL(), KLPenalty(0.1)])
def test_gradient_is_the_same_with_and_without_shared_prompts(dtype, bound, kl):
    objective = Objective(
        loss=ClippedLoss(), aggregation=TokenMean(), kl=kl, old_policy=RolloutAnchor(), entropy_coefficient=0.01
    )
    it = learner(dtype, objective, source=GPT2)
    data = sequences(dtype)
    # Four prompts of three samples, in no order; completions of one token, and masked ones, are among them.
    data = [dataclasses.replace(s, prompt_token_ids=data[i % 4].prompt_token_ids) for i, s in enumerate(data)]
    found, shared = [], 0
    for it.share_prompts in (False, True):
        for it.config.max_tokens_per_microbatch in (1000, 45, 20, 1):
            [micro] = it.anchored([it.microbatches(data, range(len(data)))])
            shared += sum(m.prompts is not None for m in micro)
            assert it.share_prompts or not shared
            it.accumulate(micro, Meter(), never_stop, first=True)
            found.append(torch.cat([p.grad.flatten() for p in it.policy.parameters()]))
            it.optimizer.zero_grad(set_to_none=True)
    assert shared >= 4
    assert max(float((other - found[0]).norm() / found[0].norm()) for other in found) <= bound


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), min_size=1, max_size=60), st.integers(1, 200))
@example([(0, 30), (0, 30)], 61)  # shared 61 tokens, but they are not
@example([(0, 1), (0, 1), (2, 1)], 17)  # nothing follows the prompts: not shared
def test_shared_prompts_keep_the_budget(rows, budget):
    """Whether a micro-batch shares its prompts or, where that saves little, does not."""
    data = [
        TrainingSequence(
            prompt_token_ids=np.full(3 * key + 1, key),
            token_ids=np.ones(rest, np.int64),
            behavior_logprobs=np.zeros(rest, np.float32),
            loss_mask=np.ones(rest, np.bool_),
            group=key,
        )
        for key, rest in rows
    ]
    prompts = [(key, 3 * key + 1) for key, _ in rows]
    plan = plan_microbatches([s.total_tokens for s in data], budget, prompts=prompts)
    assert sorted(i for part in plan for i in part) == list(range(len(rows)))
    for part in plan:
        micro = collate(data, part, dict.fromkeys(part, 1.0), share_prompts=True)
        padded = micro.input_ids.numel() + (micro.prompts.input_ids.numel() if micro.prompts else 0)
        assert padded <= budget or len(part) == 1


def labelled(dtype: torch.dtype) -> list[TrainingSequence]:
    """Four groups, interleaved: two of both labels, one without a right answer, one without a wrong one."""
    rewards = {0: [1, 0, 0, 0], 1: [0, 0], 2: [1, 1, 0], 3: [1, 1, 1]}
    owner = [0, 2, 1, 0, 3, 3, 2, 0, 1, 2, 0, 3]
    left = {group: list(values) for group, values in rewards.items()}
    return [
        dataclasses.replace(one, group=10 + g, advantage=left[g].pop() - sum(rewards[g]) / len(rewards[g]))
        for one, g in zip(sequences(dtype), owner, strict=True)
    ]


def whole_group_gradient(it: Learner, data: list[TrainingSequence]) -> tuple[torch.Tensor, float]:
    """Autograd of the definition: all sequences in one graph, the loss of their scores, KL and entropy by weight."""
    weights = it.weights(data, range(len(data)))
    micro = collate(data, range(len(data)), weights)
    logprobs, entropy = it.policy(micro, entropy_grad=True)
    with torch.no_grad():
        reference, _ = it.reference(micro) if it.reference else (logprobs, entropy)
    drift = (logprobs.double() - micro.behavior_logprobs.double()).split(micro.counts)
    advantages = torch.tensor([s.advantage for s in data], dtype=torch.float64)
    group = torch.tensor([s.group - 10 for s in data])
    loss = it.objective.loss(torch.stack([d.mean() for d in drift]), advantages, group)
    penalty = it.objective.kl(logprobs, reference).per_token if it.reference else 0
    terms = penalty - it.objective.entropy_coefficient * entropy
    (loss + (micro.weights * terms).sum()).backward()
    flat = torch.cat([p.grad.flatten() for p in it.policy.parameters()])
    it.optimizer.zero_grad(set_to_none=True)
    return flat.clone(), loss.item()


@pytest.mark.parametrize("loss", [Real(), RealBce(), RealProduct()])
@pytest.mark.parametrize("aggregation", [TokenMean(), SequenceMeanTokenMean(), ConstantLength(16)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("terms", [{"kl": NoKL()}, {"kl": KLPenalty(0.1), "entropy_coefficient": 0.01}])
def test_gradient_of_a_loss_over_groups_is_that_of_one_graph_for_every_split(loss, aggregation, dtype, bound, terms):
    it = learner(dtype, Objective(loss=loss, aggregation=aggregation, old_policy=RolloutAnchor(), **terms))
    data = labelled(dtype)
    want, value = whole_group_gradient(it, data)
    assert want.norm() > 0
    rng = np.random.default_rng(1)
    lengths = [s.total_tokens for s in data]
    splits = [plan_microbatches(lengths, n) for n in (1, 17, 40, 10**6)]
    splits += [[p.tolist() for p in np.array_split(rng.permutation(len(data)), 5)]]
    for split in splits:
        meter = Meter()
        assert (gradient(it, data, split, meter) - want).norm() / want.norm() <= bound
        assert meter.reduce(it.accelerator)["policy/loss"] == pytest.approx(value, rel=1e-6)
        assert "policy/clip_frac/low" not in meter.sums


@pytest.mark.parametrize("loss", [Real(), RealBce(), RealProduct()])
@pytest.mark.parametrize("share", [False, True])
def test_gradient_of_a_loss_over_groups_is_that_of_one_graph_for_every_packing(loss, share):
    pieces = {"kl": NoKL(), "aggregation": TokenMean(), "old_policy": RolloutAnchor()}
    it = learner(torch.float64, Objective(loss=loss, **pieces), source=GPT2)
    data = labelled(torch.float64)
    prompts = {s.group: s.prompt_token_ids for s in data}
    data = [dataclasses.replace(s, prompt_token_ids=prompts[s.group]) for s in data]
    want, _ = whole_group_gradient(it, data)
    it.share_prompts, shared = share, 0
    for it.config.max_tokens_per_microbatch in (1000, 45, 20, 1):
        [micro] = it.anchored([it.microbatches(data, range(12))])
        shared += sum(m.prompts is not None for m in micro)
        it.accumulate(it.with_slopes(micro, data, range(12), Meter()), Meter(), never_stop, first=True)
        got = torch.cat([p.grad.flatten() for p in it.policy.parameters()])
        it.optimizer.zero_grad(set_to_none=True)
        assert (got - want).norm() / want.norm() <= 1e-10
    assert (shared > 0) == share


@pytest.mark.parametrize("loss", [Real(), RealBce(), RealProduct()])
@pytest.mark.parametrize("dead", [{11, 13}, {10, 11, 12, 13}])
def test_groups_of_one_label_are_not_computed_and_change_nothing(loss, dead):
    data = [dataclasses.replace(s, advantage=0.0) if s.group in dead else s for s in labelled(torch.float64)]
    found = []
    for skip in (True, False):
        objective = Objective(loss=loss, aggregation=TokenMean(), kl=NoKL(), old_policy=RolloutAnchor())
        it = learner(torch.float64, objective, LearnerConfig(skip_zero_advantage=skip))
        [micro] = it.anchored([it.microbatches(data, range(12))])
        micro = it.with_slopes(micro, data, range(12), Meter())
        it.accumulate(micro, Meter(), never_stop, first=True)
        assert sum(len(m.counts) for m in micro) == (max(1, sum(s.group not in dead for s in data)) if skip else 12)
        found.append(torch.cat([p.grad.flatten() for p in it.policy.parameters()]))
    assert (found[0] - found[1]).norm() <= 1e-12 * found[1].norm()
    assert (found[1].norm() == 0) == (len(dead) == 4)


def test_a_loss_over_groups_that_gives_no_number_is_named():
    class Vector:
        whole_groups = True

        def __call__(self, scores, advantages, group):
            return scores * 2

    it = learner(
        torch.float64, Objective(loss=Vector(), aggregation=TokenMean(), kl=NoKL(), old_policy=RolloutAnchor())
    )
    with pytest.raises(TrainingError, match="algorithm.loss"):
        it.step(labelled(torch.float64), never_stop)


def test_filler_has_no_score():
    """On another rank the sequence counts: under the sum over ranks its score would be there twice."""
    it = learner(torch.float64, Objective(loss=Real(), aggregation=TokenMean(), kl=NoKL(), old_policy=RolloutAnchor()))
    data, meter = labelled(torch.float64), Meter()
    filler = collate(data, range(12), it.weights(data, range(12)), counted=False)
    [micro] = it.anchored([[filler]])
    it.accumulate(it.with_slopes(micro, data, range(12), meter), meter, never_stop, first=True)
    metrics = meter.reduce(it.accelerator)
    assert metrics["policy/loss"] == pytest.approx((math.log(2 * 4) + math.log(3 * 2)) / 4)  # s = 0 throughout
    assert "policy/kl_old" not in metrics and all(float(p.grad.abs().max()) == 0 for p in it.policy.parameters())


@pytest.mark.parametrize("updates", [1, 2])
def test_scores_start_at_zero_and_move_with_the_updates_of_a_batch(updates):
    """Recomputed anchor: s = 0 in the first update, where REAL's loss is log(1 + right) + log(1 + wrong)."""
    objective = Objective(loss=Real(), aggregation=TokenMean(), kl=NoKL(), old_policy=RecomputeAnchor())
    config = LearnerConfig(updates_per_step=updates, learning_rate=1e-2, warmup_steps=0, skip_zero_advantage=False)
    it = learner(torch.float64, objective, config)
    data = labelled(torch.float64)
    values = []
    original = it.with_slopes

    def watched(part, *rest):
        out = original(part, *rest)
        values.append([m.old_logprobs is None for m in part])
        return out

    it.with_slopes = watched
    metrics = it.step(data, never_stop)
    assert [all(v) for v in values] == [True, False][:updates]
    assert ("policy/kl_old" in metrics) == (updates == 2)
    if updates == 1:  # groups of 1 + 3 and 2 + 1 among four
        assert metrics["policy/loss"] == pytest.approx((math.log(2 * 4) + math.log(3 * 2)) / 4)
        assert metrics["policy/sequence_slope/max"] == pytest.approx(2 / 2)
    else:  # groups are in order of appearance: 0 and 2, then 1 and 3, which have one label each
        assert metrics["policy/kl_old"] > 0
    assert not [name for name in metrics if "clip" in name]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 200), st.integers(1, 4))
def test_microbatches_keep_the_budget_and_are_even_over_ranks(lengths, budget, ranks):
    plan = plan_microbatches(lengths, budget, ranks)
    assert sorted(i for part in plan for i in part) == list(range(len(lengths)))
    padded = [len(part) * max(lengths[i] for i in part) for part in plan]
    assert all(tokens <= budget or len(part) == 1 for part, tokens in zip(plan, padded, strict=True))
    parts = -(-len(plan_microbatches(lengths, budget)) // ranks) * ranks
    assert len(plan) <= parts
    if len(set(lengths)) == 1:
        assert max(len(part) for part in plan) == -(-len(lengths) // parts)


def test_two_ranks_together_hold_every_sequence_once_and_run_equally_often():
    plan = plan_microbatches([5, 9, 3, 7, 8], 10)
    shares = [share_of_rank(plan, rank, 2) for rank in range(2)]
    assert len(shares[0]) == len(shares[1])
    counted = sorted(i for share in shares for part, counts in share if counts for i in part)
    assert counted == [0, 1, 2, 3, 4]


def test_filler_adds_no_gradient():
    objective = Objective(loss=ClippedLoss(), aggregation=TokenMean(), kl=NoKL(), old_policy=RolloutAnchor())
    it = learner(torch.float64, objective)
    data = sequences(torch.float64)
    filler = collate(data, [3], it.weights(data, range(len(data))), counted=False)
    it.accumulate([filler], Meter(), never_stop, first=True)
    assert all(float(p.grad.abs().max()) == 0 for p in it.policy.parameters())


@pytest.mark.parametrize("loss", [ClippedLoss(), SequenceClippedLoss(), ClippedImportanceLoss(), PolicyGradientLoss()])
@pytest.mark.parametrize("aggregation", [TokenMean(), SequenceMeanTokenMean(), ConstantLength(16), PromptMean()])
@pytest.mark.parametrize("dead", [range(3, 9), range(12), range(0)])
def test_sequences_without_advantage_are_not_computed_and_change_nothing(loss, aggregation, dead):
    data = [dataclasses.replace(s, advantage=0.0) if i in dead else s for i, s in enumerate(sequences(torch.float64))]
    found = []
    for skip in (True, False):
        objective = Objective(loss=loss, aggregation=aggregation, kl=NoKL(), old_policy=RolloutAnchor())
        it = learner(torch.float64, objective, LearnerConfig(skip_zero_advantage=skip))
        [micro] = it.anchored([it.microbatches(data, range(12))])
        it.accumulate(micro, Meter(), never_stop, first=True)
        computed = sum(len(m.counts) for m in micro)
        assert computed == (max(1, 12 - len(dead)) if skip else 12)
        found.append(torch.cat([p.grad.flatten() for p in it.policy.parameters()]))
    assert (found[0] - found[1]).norm() <= 1e-12 * found[1].norm()


def test_terms_beside_the_loss_need_every_sequence():
    parts = {"loss": ClippedLoss(), "aggregation": TokenMean(), "old_policy": RolloutAnchor()}
    assert not learner(torch.float64, Objective(**parts, kl=KLPenalty(0.1))).skips_zero_advantage
    assert not learner(torch.float64, Objective(**parts, kl=NoKL(), entropy_coefficient=0.1)).skips_zero_advantage
    assert learner(torch.float64, Objective(**parts, kl=NoKL())).skips_zero_advantage


def test_updates_split_by_whole_groups():
    parts = split_groups([0, 0, 1, 1, 1, 2, 3, 3], 3)
    assert sorted(i for part in parts for i in part) == list(range(8))
    groups = [{(0, 0, 1, 1, 1, 2, 3, 3)[i] for i in part} for part in parts]
    assert all(not a & b for n, a in enumerate(groups) for b in groups[n + 1 :])


@pytest.mark.parametrize("advantage", [GroupNormalizedAdvantage(), MeanCentredAdvantage()])
def test_advantages_sum_to_zero_in_every_group_and_vanish_in_constant_ones(advantage):
    # methods.md T2.1: A sums to 0 per group; all-same groups have A = 0.
    scores = torch.tensor([1, 0, 0, 0.1, 0.1, 0.1, 1, 0.5], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    out = advantage(AdvantageInputs(scores=scores, group=group, lengths=torch.ones(8)))
    for g in range(3):
        assert abs(float(out[group == g].sum())) < 1e-12
    assert (out[group == 1] == 0).all()


def test_group_normalisation_uses_the_unbiased_deviation():
    # methods.md T2.1: A_i = (R_i - mean) / (std_u + epsilon).
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    inputs = AdvantageInputs(scores=scores, group=torch.zeros(4).long(), lengths=torch.ones(4))
    expected = (scores - 0.25) / (scores.std() + 1e-6)
    torch.testing.assert_close(GroupNormalizedAdvantage()(inputs), expected)


def test_clipped_loss_equals_a_loop_over_its_definition():
    # Schulman et al. 2017 eq. 7; dual clip of Ye et al. 2019 eq. 5.
    generator = torch.Generator().manual_seed(0)
    lp, old, adv = (torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(3))
    got = ClippedLoss(0.2, 0.28, 3.0)(
        LossInputs(
            logprobs=lp,
            old_logprobs=old,
            behavior_logprobs=old,
            advantages=adv,
            sequence=torch.zeros(200).long(),
            sequences=1,
        )
    ).per_token
    for i in range(200):
        r = float(torch.exp(lp[i] - old[i]))
        a = float(adv[i])
        loss = max(-r * a, -min(max(r, 0.8), 1.28) * a)
        if a < 0:
            loss = min(loss, -3.0 * a)
        assert float(got[i]) == pytest.approx(loss, abs=1e-12)


def test_step_at_learning_rate_zero_leaves_weights_and_ratio():
    objective = Objective(loss=ClippedLoss(), aggregation=TokenMean(), kl=NoKL(), old_policy=RolloutAnchor())
    it = learner(torch.float32, objective)
    before = [p.detach().clone() for p in it.policy.parameters()]
    it.config = dataclasses.replace(it.config, learning_rate=0.0)
    metrics = it.step(sequences(torch.float32), never_stop)
    assert metrics["learner/learning_rate"] == 0
    for a, b in zip(before, it.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_kl_in_the_reward_takes_off_each_score():
    """sum_t (behaviour log-prob - reference log-prob), whatever the micro-batches; nothing is added to the loss."""
    pieces = {"loss": ClippedLoss(), "aggregation": TokenMean(), "old_policy": RolloutAnchor()}
    it = learner(torch.float64, Objective(**pieces, kl=KLInReward(coefficient=0.5)))
    data = sequences(torch.float64)
    weights = it.weights(data, range(len(data)))
    whole = collate(data, list(range(len(data))), weights)
    with torch.no_grad():
        reference, _ = it.reference(whole)
    tokens = 0.5 * (whole.behavior_logprobs.double() - reference)
    expected = torch.stack([one.sum() for one in tokens.split(whole.counts)])
    for size in (8192, 20):
        it.config.max_tokens_per_microbatch = size
        found, metrics = it.reward_penalties(data)
        torch.testing.assert_close(found, expected)
        assert metrics["policy/kl_ref"] == pytest.approx(float(2 * tokens.mean()))
    plain = learner(torch.float64, Objective(**pieces, kl=NoKL()))
    parts = [list(range(len(data)))]
    assert torch.equal(gradient(it, data, parts), gradient(plain, data, parts))
    assert it.skips_zero_advantage and plain.reward_penalties(data) == (pytest.approx(torch.zeros(12)), {})
