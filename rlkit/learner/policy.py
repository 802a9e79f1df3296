"""The policy as the learner runs it: token ids -> log-probs of the sampled tokens, no logits kept.

Sequences are right-padded and attention is causal, so no real token ever attends to padding and no
attention mask is needed. Position ids are passed explicitly: `generate` derives them from the mask,
a bare forward does not for every architecture, and a ratio would be wrong from step 0.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlkit.errors import ConfigError
from rlkit.learner.logprobs import selected_logprobs

# Settings by which an architecture changes its logits after the head; the chunked head does not apply
# them, so such a model is refused unless the setting is at its neutral value.
NEUTRAL = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0}


class Policy(nn.Module):
    """A causal LM with the chunked log-prob head of `rlkit.learner.logprobs`.

    The whole computation is in `forward`, so that DDP and FSDP wrappers see it.
    """

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
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        head_positions: Tensor,
        targets: Tensor,
        entropy_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy, at the sampling temperature, of chosen next tokens.

        Args:
            input_ids, position_ids: [B, L].
            head_positions: [n] indices into the flattened [B * L] hidden states.
            targets: [n] the token that follows each of them.

        Returns:
            logprobs [n] and entropies [n], float32 or wider, in nats.
        """
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        logprobs, entropy = selected_logprobs(
            hidden.flatten(0, 1).index_select(0, head_positions),
            head.weight,
            targets,
            bias=getattr(head, "bias", None),
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
            entropy_grad=entropy_grad,
        )
        assert entropy is not None
        return logprobs, entropy
