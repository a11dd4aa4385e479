"""PEFT's prefix tuning, with a `generate` that works. This module needs PEFT."""

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModelForCausalLM, PrefixTuningConfig
from transformers import GenerationConfig, PreTrainedModel

from hf_sara.tasks.e2e import cache_argument


class PrefixModel(PeftModelForCausalLM):
    """
    PEFT's prefix tuning with a `generate` that decodes what `forward` computes. The `generate` of PEFT 0.21 passes
    the prefix under a name that transformers changed in 5.24, so it decodes something else, without any error.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model. It is frozen.
        num_virtual_tokens (`int`): The length of the prefix.
    """

    def __init__(self, model: PreTrainedModel, num_virtual_tokens: int):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)
        config.base_model_name_or_path = model.name_or_path
        super().__init__(model, config)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Call the base's `generate` with the prefix in its cache.

        Args:
            input_ids (`torch.Tensor` of shape `(rows, length)`): Prompts, padded on the left.
            attention_mask (`torch.Tensor` of shape `(rows, length)`): 0 on the padding.
            generation_config ([`~transformers.GenerationConfig`], *optional*): As for the base. `max_length` counts
                the prefix too, `max_new_tokens` does not.
            kwargs: Further arguments of the base's `generate`.

        Returns:
            `torch.Tensor` of shape `(rows, length + new tokens)`: The prompts and the generated tokens.
        """
        base, prefix = self.get_base_model(), self.active_peft_config.num_virtual_tokens
        settings = (generation_config or base.generation_config).to_dict() | kwargs
        rows = len(input_ids) * max(settings.get("num_beams") or 1, settings.get("num_return_sequences") or 1)
        # `generate` assumes that the cache belongs to the first ids, so there has to be an id for each of the prefix.
        output = base.generate(
            input_ids=F.pad(input_ids, (prefix, 0)),
            attention_mask=F.pad(attention_mask, (prefix, 0), value=1),
            generation_config=generation_config,
            **{cache_argument(base): self.get_prompt(rows)},
            **kwargs,
        )
        return output[:, prefix:]
