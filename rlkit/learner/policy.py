"""The policy as the learner runs it: token ids -> log-probs of the sampled tokens, no logits kept.

Sequences are right-padded and attention is causal: no real token attends to padding, no mask is needed. Position ids
are explicit, because not every architecture's bare forward counts them as `generate` does. The samples of a prompt
can share its forward and backward pass: its keys and values, with their graph, are handed to each of them.
"""

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlkit.errors import ConfigError
from rlkit.learner.batching import SharedPrompts
from rlkit.learner.logprobs import selected_logprobs

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

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, head_positions: Tensor, targets: Tensor,
        prompts: SharedPrompts | None = None, entropy_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Log-probs and entropies [n], at the sampling temperature, of chosen next tokens, float32 or wider, in nats.

        input_ids and position_ids [B, L]; head_positions [n] are indices into the flattened hidden states, those of
        `prompts` [P * Q] first where there are any, then [B * L]; targets [n] the token that follows each of them.
        """
        hidden = self._hidden(input_ids, position_ids, prompts)
        head = self.model.get_output_embeddings()
        chosen, bias = hidden.index_select(0, head_positions), getattr(head, "bias", None)
        logprobs, entropy = selected_logprobs(
            chosen, head.weight, targets, bias=bias, temperature=self.temperature, chunk_logits=self.chunk_logits,
            entropy_grad=entropy_grad,
        )  # fmt: skip
        assert entropy is not None
        return logprobs, entropy

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, prompts: SharedPrompts | None) -> Tensor:
        decoder = self.model.get_decoder()
        if prompts is None:
            whole: Tensor = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
            return whole.flatten(0, 1)
        cache = DynamicCache(config=self.model.config)
        places = torch.arange(prompts.input_ids.shape[1], device=input_ids.device).expand_as(prompts.input_ids)
        first = decoder(input_ids=prompts.input_ids, position_ids=places, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(prompts.owner)
        rest = decoder(
            input_ids=input_ids, position_ids=position_ids, attention_mask=prompts.mask, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        return torch.cat([first.last_hidden_state.flatten(0, 1), rest.last_hidden_state.flatten(0, 1)])
