"""The policy as the learner runs it: token ids -> log-probs of the sampled tokens, no logits kept.

Sequences are right-padded and attention is causal: no real token attends to padding, no mask is needed. Position ids
are explicit, because not every architecture's bare forward counts them as `generate` does.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlkit.errors import ConfigError
from rlkit.learner.logprobs import selected_logprobs

# Settings that change logits after the head; the chunked head does not apply them: refused unless neutral.
NEUTRAL = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0}


class Policy(nn.Module):
    """A causal LM with the chunked log-prob head, all of it in `forward`, so that DDP and FSDP wrappers see it."""

    def __init__(self, model: PreTrainedModel, *, temperature: float, chunk_tokens: int) -> None:
        super().__init__()
        for name, neutral in NEUTRAL.items():
            value = getattr(model.config, name, neutral)
            if value is not None and value != neutral:
                problem = "this architecture rescales its logits, which the log-prob head does not"
                raise ConfigError(problem, key=f"model config {name}", value=value, expected=repr(neutral))
        if model.get_output_embeddings() is None:
            raise ConfigError("the model has no language-model head", key="model", value=type(model).__name__)
        self.model = model
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, head_positions: Tensor, targets: Tensor,
        entropy_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Log-probs and entropies [n], at the sampling temperature, of chosen next tokens, float32 or wider, in nats.

        input_ids and position_ids [B, L]; head_positions [n] are indices into the flattened [B * L] hidden states,
        targets [n] the token that follows each of them.
        """
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        chosen, bias = hidden.flatten(0, 1).index_select(0, head_positions), getattr(head, "bias", None)
        logprobs, entropy = selected_logprobs(
            chosen, head.weight, targets, bias=bias, temperature=self.temperature, chunk_tokens=self.chunk_tokens,
            entropy_grad=entropy_grad,
        )  # fmt: skip
        assert entropy is not None
        return logprobs, entropy
