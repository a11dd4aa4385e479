"""The E2E task as the recipe runs it."""

from collections.abc import Sequence
from os import PathLike

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hf_sara.tasks.e2e import beam_search, decode_text, encode_prompts, eos_tokens

from .predictions import decode_to_file


class E2ETrainerMixin:
    """Makes a Trainer's evaluation loss the plain cross-entropy also where training smooths its labels."""

    def prediction_step(self, *args, **kwargs):
        smoothing = self.label_smoother, self.compute_loss_func
        self.label_smoother = self.compute_loss_func = None
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.label_smoother, self.compute_loss_func = smoothing


def generate_predictions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mrs: Sequence[str],
    path: str | PathLike,
    batch_size: int = 16,
    **search,
) -> list[str]:
    """
    Decode a text for each meaning representation, into a file that an interrupted call goes on with.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, with its adapter.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        mrs (`Sequence[str]`): Distinct meaning representations.
        path (`str` or `os.PathLike`): JSON lines with `mr` and `prediction`; in the end in the order of `mrs`.
        batch_size (`int`, *optional*, defaults to 16): Prompts that are decoded together.
        search: Passed on to [`beam_search`].

    Returns:
        `list[str]`: The texts, in the order of `mrs`.
    """
    prompts = encode_prompts(tokenizer, mrs)

    def decode(batch: list[int]) -> list[dict[str, str]]:
        outputs = beam_search(
            model, [prompts[index] for index in batch], eos_token_ids=eos_tokens(tokenizer), **search
        )
        return [
            {"mr": mrs[index], "prediction": decode_text(tokenizer, output)}
            for index, output in zip(batch, outputs, strict=True)
        ]

    rows = decode_to_file(path, "mr", mrs, [len(prompt) for prompt in prompts], decode, batch_size)
    return [row["prediction"] for row in rows]
