"""Likelihood rewards through the real learner: methods.md T1.1, unit tests 1 and 5."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlkit.algorithms.advantages.jepo import GroupLikelihoodAdvantage
from rlkit.algorithms.advantages.rloo import LeaveOneOutAdvantage
from rlkit.algorithms.aggregation import ConstantLength, SequenceMeanTokenSum, TokenMean
from rlkit.algorithms.kl import NoKL
from rlkit.algorithms.likelihood import AvgLogProb, AvgProb, Jepo, LikelihoodReward, LogProb, Nover, Prob
from rlkit.algorithms.losses.policy_gradient import ImportanceWeightedLoss, PolicyGradientLoss
from rlkit.algorithms.old_policy import RolloutAnchor
from rlkit.config.schema import LearnerConfig, ModelConfig
from rlkit.errors import DataError
from rlkit.evaluation.estimators import summarise_references
from rlkit.learner.assemble import assemble
from rlkit.learner.batching import TrainingSequence, collate, plan_microbatches
from rlkit.learner.likelihood import NO_DELIMITER, TOO_LONG, LikelihoodScorer, chain_end
from rlkit.learner.model import character_tokenizer, load_model
from rlkit.learner.policy import Policy
from rlkit.learner.update import Learner, Meter, Objective, never_stop
from rlkit.types import Group, Prompt, Rollout, Verdict, VersionSpan

TINY = ModelConfig(
    architecture={
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 12,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    },
    alphabet="ab#",
)
TOKENIZER = character_tokenizer("ab#")
MARKS = {"delimiter": "#", "opening": "", "closing": "<eos>"}
PROMPT = Prompt(id="p", text="a", token_ids=np.array([1, 4]), reference="ab")
LIMIT = 2  # sampled tokens
REWARDS = [kind(**MARKS, max_importance_weight=None) for kind in (LogProb, AvgLogProb, Prob, AvgProb)]
name_of = lambda x: type(x).__name__  # noqa: E731


def policy(seed: int = 0, share: bool = True) -> Policy:
    made = Policy(load_model(TINY, TOKENIZER, torch.float64, seed), temperature=0.8, chunk_logits=64)
    made.can_share_prompts = share
    return made


def learner(reward: LikelihoodReward | None, loss=None, aggregation=None, share: bool = True) -> Learner:
    objective = Objective(
        loss=loss or PolicyGradientLoss(),
        aggregation=aggregation or SequenceMeanTokenSum(),
        kl=NoKL(),
        old_policy=RolloutAnchor(),
        likelihood=reward,
    )
    return Learner(policy(share=share), None, objective, LearnerConfig(), Accelerator(cpu=True), 1)


def scorer(reward: LikelihoodReward, of: Policy, max_tokens: int = 12) -> LikelihoodScorer:
    return LikelihoodScorer(
        reward=reward, policy=of, reference=None, tokenizer=TOKENIZER, max_tokens=max_tokens, microbatch_tokens=40
    )


def rollout(tokens: list[int], index: int = 0, ordinal: int = 0, behavior: list[float] | None = None) -> Rollout:
    count = len(tokens)
    return Rollout(
        ordinal=ordinal,
        index=index,
        token_ids=np.array(tokens),
        behavior_logprobs=np.array(behavior or [-1.0] * count),
        loss_mask=np.ones(count, dtype=bool),
        segments=np.zeros(count, dtype=np.int64),
        version_spans=(VersionSpan(version=0, start=0, end=count),),
        finish_reason="stop",
        engine_id="test",
        text=TOKENIZER.decode(tokens, skip_special_tokens=True),
    )


def group_of(rollouts: list[Rollout], scores: list[float | None] | None = None, prompt: Prompt = PROMPT) -> Group:
    verdicts = tuple(Verdict(score=s) for s in scores or [0.0] * len(rollouts))
    return Group(
        ordinal=rollouts[0].ordinal, prompt=prompt, samples=len(rollouts), rollouts=tuple(rollouts), verdicts=verdicts
    )


def sampled_chains() -> list[list[int]]:
    """Every chain of up to LIMIT tokens over the whole vocabulary of 7: what ends at "#" (id 6), and the rest."""
    out = []
    for length in range(1, LIMIT + 1):
        for tokens in itertools.product(range(7), repeat=length):
            ended = tokens[-1] == 6
            if 6 not in tokens[:-1] and (ended or length == LIMIT):
                out.append(list(tokens))
    return out


def log_table(of: Policy, sequences: list[list[int]], prompt: list[int]) -> torch.Tensor:
    """Log-probs of whole sequences behind a prompt by a plain forward, [len(sequences)], with gradient."""
    sums = []
    for tokens in sequences:
        logits = of.model(input_ids=torch.tensor([prompt + tokens])).logits[0] / of.temperature
        table = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        sums.append(table.gather(1, torch.tensor(tokens)[:, None]).squeeze(1))
    return sums


def assert_gradient(it: Learner, ascent: tuple[torch.Tensor, ...]) -> None:
    """To 1e-6: transformers' norms round to float32, even in a float64 model."""
    want = torch.cat([x.flatten() for x in ascent])
    got = -torch.cat([p.grad.flatten() for p in it.policy.parameters()])
    assert want.norm() > 1e-3
    assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("reward", REWARDS, ids=name_of)
def test_expected_gradient_of_the_learner_is_that_of_the_objective(reward, off_policy):
    """All chains of a tiny model, scored and trained on by the real code, weighted by their chance: grad E[R].

    One sample a group with the baseline 0 (unbiased as any constant); a chain without "#" has the constant floor.
    """
    it = learner(reward, ImportanceWeightedLoss(None) if off_policy else PolicyGradientLoss())
    chains = sampled_chains()
    prompt = PROMPT.token_ids.tolist()
    answer = TOKENIZER("ab<eos>", add_special_tokens=False).input_ids
    of_chains = log_table(it.policy, chains, prompt)
    sums = torch.stack([one.sum() for one in of_chains])
    assert float(sums.detach().exp().sum()) == pytest.approx(1.0)
    values = []
    for chain in chains:
        l_t = log_table(it.policy, [answer], prompt + chain)[0]
        found = l_t if chain[-1] == 6 else torch.full((3,), -math.log(7), dtype=torch.float64)
        values.append(reward.reward(found))
    objective = (sums.exp() * torch.stack(values)).sum()
    parameters = list(it.policy.parameters())
    exact = torch.autograd.grad(objective, parameters)

    behavior = of_chains
    if off_policy:
        behavior = log_table(policy(seed=5), chains, prompt)
    groups = [group_of([rollout(chain, ordinal=n, behavior=behavior[n].tolist())]) for n, chain in enumerate(chains)]
    scored, made, _ = scorer(reward, it.policy, max_tokens=8).score(groups)
    torch.testing.assert_close(
        torch.tensor([g.verdicts[0].score for g in scored], dtype=torch.float64), torch.stack(values).detach()
    )
    sequences = [dataclasses.replace(one, advantage=g.verdicts[0].score) for g, one in zip(scored, made, strict=True)]
    chance = {n: float(behavior[n].detach().sum().exp()) for n in range(len(chains))}
    microbatches = [
        collate(sequences, part, chance, share_prompts=True)
        for part in plan_microbatches([s.total_tokens for s in sequences], 90)
    ]
    it.accumulate(microbatches, Meter(), never_stop, first=True)
    assert_gradient(it, exact)


def test_expected_gradient_of_jepo_is_that_of_its_group_objective():
    """Groups of two of a few chains with given chances: A grad log pi and softmax grad S, through the learner."""
    size = 2
    reward = Jepo(**MARKS)
    it = learner(reward)
    chains = [[6], [4, 6], [5, 6]]
    prompt, answer = PROMPT.token_ids.tolist(), TOKENIZER("ab<eos>", add_special_tokens=False).input_ids
    of_chains = log_table(it.policy, chains, prompt)
    sums = torch.stack([one.sum() for one in of_chains])
    likelihood = torch.stack([log_table(it.policy, [answer], prompt + chain)[0].sum() for chain in chains])
    pairs = list(itertools.product(range(3), repeat=size))
    objective = sum(
        sums[list(pair)].sum().exp() * (likelihood[list(pair)].logsumexp(0) - math.log(size)) for pair in pairs
    )
    # A baseline has gradient c(the others) sum_z grad pi(z), which is 0 only over all chains: taken off here.
    mass = sums.exp().sum()
    baseline = sum(
        size * mass * (sums.exp().detach()[list(others)].prod() * (likelihood.detach()[list(others)].logsumexp(0)))
        for others in itertools.product(range(3), repeat=size - 1)
    )
    exact = torch.autograd.grad(objective - baseline, list(it.policy.parameters()))
    groups = [
        group_of([rollout(chains[z], i, n, of_chains[z].tolist()) for i, z in enumerate(pair)])
        for n, pair in enumerate(pairs)
    ]
    scored, made, _ = scorer(reward, it.policy).score(groups)
    sequences, metrics = assemble(scored, GroupLikelihoodAdvantage(), 0, {0: 0}, made=made)
    assert "group/all_correct_frac" not in metrics and "group/dead_frac" in metrics
    weights = {i: float(sums.detach()[list(pairs[s.group])].sum().exp()) for i, s in enumerate(sequences)}
    it.accumulate([collate(sequences, range(len(sequences)), weights)], Meter(), never_stop, first=True)
    assert_gradient(it, exact)


def mixed_groups() -> list[Group]:
    rng = np.random.default_rng(2)
    groups = []
    for n in range(4):
        chains = [rng.integers(3, 6, rng.integers(0, 5)).tolist() for _ in range(4)]
        prompt = dataclasses.replace(
            PROMPT, token_ids=np.array([1, *rng.integers(4, 6, n)]), reference="ab"[: 1 + n % 2]
        )
        ends = [[6, 4, 2], [6], [6, 5, 6], [5]]  # with tokens behind the chain, which are not trained on; or none
        behavior = [rng.normal(-1.5, 0.3, len(c) + len(e)).tolist() for c, e in zip(chains, ends, strict=True)]
        rollouts = [rollout(c + e, i, n, b) for i, (c, e, b) in enumerate(zip(chains, ends, behavior, strict=True))]
        groups.append(group_of(rollouts, prompt=prompt))
    return groups


def training_set(reward: LikelihoodReward, it: Learner) -> list[TrainingSequence]:
    scored, made, _ = scorer(reward, it.accelerator.unwrap_model(it.policy)).score(mixed_groups())
    advantage = GroupLikelihoodAdvantage() if reward.log_scores else LeaveOneOutAdvantage()
    return assemble(scored, advantage, 0, {0: 0}, made=made)[0]


def gradient(it: Learner, data: list[TrainingSequence], parts, share: bool) -> torch.Tensor:
    weights = it.weights(data, range(len(data)))
    it.accumulate([collate(data, p, weights, share_prompts=share) for p in parts], Meter(), never_stop, first=True)
    flat = torch.cat([p.grad.flatten() for p in it.policy.parameters()])
    it.optimizer.zero_grad(set_to_none=True)
    return flat.clone()


@pytest.mark.parametrize("reward", [*REWARDS, Jepo(**MARKS)], ids=name_of)
@pytest.mark.parametrize("aggregation", [SequenceMeanTokenSum(), TokenMean(), ConstantLength(16)], ids=name_of)
def test_gradient_is_the_same_for_every_split(reward, aggregation):
    it = learner(reward, PolicyGradientLoss() if reward.log_scores else ImportanceWeightedLoss(), aggregation)
    data = training_set(reward, it)
    assert any(s.answer_tokens for s in data) and not all(s.answer_tokens for s in data)
    whole = gradient(it, data, [list(range(len(data)))], share=False)
    without = dataclasses.replace(reward, answer_gradient=False)
    alone = gradient(learner(without, it.objective.loss, aggregation), training_set(without, it), [range(16)], False)
    assert (whole - alone).norm() > 1e-3 * whole.norm()
    rng = np.random.default_rng(1)
    lengths = [s.total_tokens for s in data]
    prompts = [(s.prompt_token_ids.tobytes(), len(s.prompt_token_ids)) for s in data]
    splits = [plan_microbatches(lengths, n) for n in (1, 17, 40)] + [plan_microbatches(lengths, 30, prompts=prompts)]
    splits += [[p.tolist() for p in np.array_split(rng.permutation(len(data)), 5)]]
    for split, share in itertools.product(splits, (False, True)):
        assert (gradient(it, data, split, share) - whole).norm() <= 1e-8 * whole.norm()


def test_samples_without_advantage_are_computed_where_the_answer_has_a_gradient():
    for gradient_flows in (True, False):
        it = learner(LogProb(answer_gradient=gradient_flows))
        assert it.skips_zero_advantage is not gradient_flows
    assert learner(None).skips_zero_advantage


def test_scores_are_those_of_a_plain_forward_and_do_not_depend_on_microbatches():
    it = learner(LogProb(**MARKS))
    groups = mixed_groups()
    scored, made, metrics = scorer(LogProb(**MARKS), it.policy).score(groups)
    for group in scored:
        for r, verdict in zip(group.rollouts, group.verdicts, strict=True):
            tokens = r.token_ids.tolist()
            answer = TOKENIZER(f"{group.prompt.reference}<eos>", add_special_tokens=False).input_ids
            want = len(answer) * -math.log(7)
            if 6 in tokens:
                chain = tokens[: tokens.index(6) + 1]
                [one] = [s for s in made if (s.group, s.index) == (r.ordinal, r.index)]
                assert one.token_ids.tolist() == chain + answer and one.answer_tokens == len(answer)
                assert one.loss_mask.tolist() == [True] * len(chain) + [False] * len(answer)
                assert len(one.behavior_logprobs) == len(one.token_ids)
                [logprobs] = log_table(it.policy, [answer], [*group.prompt.token_ids.tolist(), *chain])
                want = float(logprobs.detach().sum())
            assert verdict.score == verdict.parts["likelihood"] == pytest.approx(want)
    assert metrics["reward/likelihood/missing_frac"] == 0.25
    small = dataclasses.replace(scorer(LogProb(**MARKS), it.policy), microbatch_tokens=1)
    again = small.score(groups)[0]
    assert [v.score for g in again for v in g.verdicts] == pytest.approx([v.score for g in scored for v in g.verdicts])


def test_what_has_no_place_is_floored_dropped_or_too_long():
    it = policy()
    group = group_of([rollout([4, 6, 5], 0), rollout([4, 5, 5], 1), rollout([4] * 9 + [6], 2)])
    floor = scorer(Prob(**MARKS), it)
    assert [floor.place(PROMPT, r)[1] for r in group.rollouts] == [None, NO_DELIMITER, TOO_LONG]
    assert floor.gate(group) is group
    scored, made, metrics = floor.score([group])
    assert [s.answer_tokens for s in made] == [3, 0, 0]
    assert scored[0].verdicts[1].score == pytest.approx(7.0**-3) == scored[0].verdicts[2].score
    assert metrics["reward/likelihood/missing_frac"] == metrics["reward/likelihood/too_long_frac"] == 1 / 3
    drop = scorer(Prob(**MARKS, missing="drop"), it)
    gated = drop.gate(group)
    assert [v.score for v in gated.verdicts] == [0.0, None, None]
    assert [v.reason for v in gated.verdicts] == [None, NO_DELIMITER, TOO_LONG]
    scored, made, _ = drop.score([gated])
    assert [s.index for s in made] == [0] and scored[0].verdicts[1].score is None


def test_mask_truncated_keeps_chains_that_ended_and_nothing_of_the_others():
    """The limit cut the answer, which is not trained on; what has no delimiter was cut as such."""
    it = policy()
    chains = [[4, 6, 5], [5, 6, 5], [5, 5, 5]]
    cut = [dataclasses.replace(rollout(chain, i), finish_reason="length") for i, chain in enumerate(chains)]
    alone = [dataclasses.replace(rollout([5, 5, 5], i, 1), finish_reason="length") for i in range(2)]
    scored, made, _ = scorer(LogProb(**MARKS), it).score([group_of(cut), group_of(alone)])
    kept, _ = assemble(scored, LeaveOneOutAdvantage(), 0, {0: 0}, made=made, mask_truncated=True)
    answers = [s.total_tokens - len(s.prompt_token_ids) - s.loss_tokens for s in kept]
    assert [(s.group, s.index) for s in kept] == [(0, 0), (0, 1), (1, 1)] and answers == [3, 3, 0]
    assert [s.advantage != 0 for s in kept] == [True, True, False]


def test_weights_add_to_the_verifiers_and_scale_the_gradient():
    it = policy()
    group = group_of([rollout([4, 6]), rollout([6], 1)], [0.5, None])
    scored, made, _ = scorer(LogProb(**MARKS, weight=0.9), it).score([group])
    first, second = scored[0].verdicts
    assert first.score == pytest.approx(0.5 + 0.9 * first.parts["likelihood"]) and second.score is None
    assert [s.answer_share for s in made] == [pytest.approx(0.9)]


def test_difference_to_the_answer_without_a_chain():
    it = policy()
    group = group_of([rollout([4, 6]), rollout([5, 5, 6], 1), rollout([5], 2)])
    plain = scorer(AvgProb(**MARKS), it).score([group])[0][0].verdicts
    [logprobs] = log_table(it, [[4, 5, 2]], [1, 4, 6])
    nothing = float(logprobs.detach().exp().mean())
    got = scorer(AvgProb(**MARKS, answer_gradient=False, subtract_no_chain=True), it).score([group])
    assert [v.score for v in got[0][0].verdicts] == pytest.approx([max(0.0, v.score - nothing) for v in plain])
    assert not any(s.answer_tokens for s in got[1])


def test_nover_is_scored_under_the_reference_where_there_is_one():
    current, reference = policy(0), policy(3)
    group = group_of([rollout([4, 6]), rollout([5, 4, 5, 6], 1), rollout([6], 2)])
    by_reference = dataclasses.replace(scorer(Nover(**MARKS), current), reference=reference).score([group])
    as_current = scorer(Nover(**MARKS), reference).score([group])
    assert [v.score for v in by_reference[0][0].verdicts] == [v.score for v in as_current[0][0].verdicts]


def bpe_tokenizer(words: bool) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    inner.decoder = decoders.ByteLevel()
    text = ["so it is 12 <answer>12</answer>", "thus <answer> 7</answer> it is", "an answer>", "<answers> é è"] * 20
    inner.train_from_iterator(text, trainers.BpeTrainer(vocab_size=330, special_tokens=["<eos>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", clean_up_tokenization_spaces=False)


BPE, GREEDY = bpe_tokenizer(words=True), bpe_tokenizer(words=False)


@pytest.mark.parametrize(
    "text", ["so it is 12 <answer>12</answer>", "é thus<answer> 7</answer>", "<answer>", "12<answer"]
)
def test_the_chain_ends_at_the_first_token_boundary_behind_the_delimiter(text):
    """T1.1 unit test 5, for a byte-level BPE, one that merges across the delimiter, and for characters."""
    for tokenizer in (BPE, GREEDY, character_tokenizer("".join(dict.fromkeys("so it is 12<answer>/7éthu")))):
        ids = np.array(tokenizer(text, add_special_tokens=False).input_ids)
        end = chain_end(ids, "<answer", tokenizer)
        prefixes = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
        first = next(n for n, p in enumerate(prefixes) if "<answer" in p)
        assert end == (first if prefixes[first].endswith("<answer") else None)
        if tokenizer is not GREEDY:
            assert prefixes[end] == text[: text.index("<answer") + 7]


def test_a_token_that_overshoots_the_delimiter_has_no_place_for_the_reference():
    ids = np.array(GREEDY("so it is 12 <answer>12", add_special_tokens=False).input_ids)
    texts = [GREEDY.decode(ids[: n + 1]) for n in range(len(ids))]
    whole = next(n for n, text in enumerate(texts) if "<answer" in text)
    assert texts[whole].endswith("<answer>")  # this vocabulary has learnt `r>`
    assert chain_end(ids, "<answer", GREEDY) is None
    assert chain_end(ids, "<answer>", GREEDY) == whole + 1
    assert chain_end(np.array(BPE("no mark", add_special_tokens=False).input_ids), "<answer", BPE) is None


def test_appended_tokens_are_those_of_chain_and_reference_each_by_itself():
    """encode(prefix) + encode(opening + reference + closing); the first is predicted from the chain's last token."""
    chain = np.array(BPE("so it is <answer>", add_special_tokens=False).input_ids)
    reward = LogProb(delimiter="<answer>", opening=" ", closing="</answer>")
    made = LikelihoodScorer(
        reward=reward, policy=policy(), reference=None, tokenizer=BPE, max_tokens=60, microbatch_tokens=100
    )
    prompt = dataclasses.replace(PROMPT, reference="12")
    tail = BPE(" it", add_special_tokens=False).input_ids
    one, why = made.place(prompt, rollout([*chain.tolist(), *tail]))
    assert why is None
    want = [*chain.tolist(), *BPE(" 12</answer>", add_special_tokens=False).input_ids]
    assert one.token_ids.tolist() == want and one.answer_start == len(chain)
    for share in (False, True):
        micro = collate([one, one], [0, 1], {0: 0.5, 1: 0.5}, share_prompts=share)
        assert micro.targets.tolist() == want[: len(chain)] * 2 + want[len(chain) :] * 2
        assert len(micro.sequence) == 2 * len(chain) and micro.answer_weights == [0.0, 0.0]
    micro = collate([one], [0], {0: 1.0})
    ids, start = micro.input_ids[0].tolist(), len(PROMPT.token_ids) + len(chain)
    positions = micro.head_positions[len(micro.sequence) :].tolist()
    assert positions == list(range(start - 1, start - 1 + one.answer_tokens))
    assert [ids[p + 1] for p in micro.head_positions] == micro.targets.tolist()


def test_characters_the_tokenizer_does_not_know_are_refused():
    with pytest.raises(DataError, match="does not know"):
        scorer(LogProb(**MARKS), policy()).answer(dataclasses.replace(PROMPT, reference="a7"))


def test_held_out_figures_equal_their_definitions():
    logprobs = [[-1.0, -2.0], [-0.5, -3.0], [-4.0, -4.0]]
    lengths = np.array([[3, 5], [1, 1], [2, 4]])
    got = summarise_references(np.array(logprobs), np.array([2, 1, 4]), lengths)
    assert got["logprob@1"][0] == pytest.approx(-14.5 / 6)
    mixed = [math.log(sum(map(math.exp, s)) / 2) for s in logprobs]
    assert got["logprob@2"] == pytest.approx((np.mean(mixed), np.std(mixed, ddof=1) / math.sqrt(3)))
    assert got["token_logprob"][0] == pytest.approx((-1.5 - 1.75 - 4) / 7)
    assert got["perplexity"][0] == pytest.approx(math.exp(14.5 / 6))
    assert got["chain_length"][0] == pytest.approx(8 / 3)
    assert math.isfinite(summarise_references(np.array([[-2000.0]]), np.array([900]), np.array([[3]]))["perplexity"][0])
    # The linearised error of a ratio is that of many resamples.
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, 400)
    many = [[float(-0.3 * t + rng.normal(0, 0.4))] for t in tokens]
    _, error = summarise_references(np.array(many), tokens, np.array(many))["token_logprob"]
    draws = rng.integers(0, 400, (2000, 400))
    ratios = np.array(many)[draws, 0].sum(1) / tokens[draws].sum(1)
    assert error == pytest.approx(ratios.std(), rel=0.1)
