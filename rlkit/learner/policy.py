"""The policy as the learner runs it: token ids -> log-probs of the sampled tokens, no logits kept.

Sequences are right-padded and attention is causal: no mask is needed. Position ids are explicit, because not every
architecture's bare forward counts them as `generate` does. The samples of a prompt can share its forward and backward
pass: its keys and values, with their graph, are handed to each of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlkit.errors import ConfigError
from rlkit.learner.batching import MicroBatch, TrainingSequence, collate, plan_microbatches
from rlkit.learner.logprobs import selected_logprobs
from rlkit.rollout.verification import probe_logprobs
from rlkit.types import FloatArray, IntArray

# Settings that change logits after the head; the chunked head does not apply them: refused unless neutral.
NEUTRAL = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0}


class Policy(nn.Module):
    """A causal LM with the chunked log-prob head, all of it in `forward`, so that DDP and FSDP wrappers see it."""

    def __init__(self, model: PreTrainedModel, *, temperature: float, chunk_logits: int) -> None:
        super().__init__()
        for name, neutral in NEUTRAL.items():
            value = getattr(model.config, name, neutral)
            if value is not None and value != neutral:
                problem = "this architecture rescales its logits, which the log-prob head does not"
                raise ConfigError(problem, key=f"model config {name}", value=value, expected=repr(neutral))
        if model.get_output_embeddings() is None:
            raise ConfigError("the model has no language-model head", key="model", value=type(model).__name__)
        self.model = model
        # Other caches drop or mix tokens; recomputed activations cannot be handed on.
        layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
        self.can_share_prompts = layers == {DynamicLayer} and not model.is_gradient_checkpointing
        self.temperature = temperature
        self.chunk_logits = chunk_logits

    def forward(self, micro: MicroBatch, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [n + m], at the sampling temperature, of the targets; float32 or wider, in nats."""
        head = self.model.get_output_embeddings()
        chosen, bias = self._hidden(micro).index_select(0, micro.head_positions), getattr(head, "bias", None)
        return selected_logprobs(
            chosen, head.weight, micro.targets, bias=bias, temperature=self.temperature,
            chunk_logits=self.chunk_logits, entropy_grad=entropy_grad,
        )  # fmt: skip

    def probe(self, token_ids: IntArray) -> FloatArray:
        """`rlkit.rollout.verification.probe_logprobs` of the model; collective where that is sharded."""
        return probe_logprobs(self.model, token_ids)

    @torch.no_grad()
    def score(self, sequences: Sequence[TrainingSequence], max_tokens: int) -> list[Tensor]:
        """Log-probs of every sequence's loss tokens, [n_i] on the CPU; `max_tokens` at a time. Not collective."""
        out, share = [torch.empty(0)] * len(sequences), self.can_share_prompts
        prompts = [s.prompt_key for s in sequences] if share else None
        for part in plan_microbatches([s.total_tokens for s in sequences], max_tokens, prompts=prompts):
            micro = collate(sequences, part, dict.fromkeys(part, 0.0), share_prompts=share).to(self.model.device)
            values = self(micro)[0][: len(micro.sequence)].cpu().split(micro.counts)
            for i, one in zip(part, values, strict=True):
                out[i] = one
        return out

    def _hidden(self, micro: MicroBatch) -> Tensor:
        """Hidden states, flattened: [B * L], behind those of shared prompts [P * Q] where there are any."""
        decoder, places, prompts = self.model.get_decoder(), micro.position_ids, micro.prompts
        if prompts is None:
            whole = decoder(input_ids=micro.input_ids, position_ids=places, use_cache=False)
            return torch.Tensor.flatten(whole.last_hidden_state, 0, 1)
        cache = DynamicCache(config=self.model.config)
        first = prompts.input_ids
        positions = torch.arange(first.shape[1], device=first.device).expand_as(first)
        read = decoder(input_ids=first, position_ids=positions, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(prompts.owner)
        rest = decoder(
            input_ids=micro.input_ids, position_ids=places, attention_mask=prompts.mask, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        return torch.cat([read.last_hidden_state.flatten(0, 1), rest.last_hidden_state.flatten(0, 1)])
