"""The E2E task (paper, section 4.4): descriptions of restaurants from meaning representations.

Data, encoding and decoding are those of microsoft/LoRA's NLG example, which the paper follows. Its beam search has
rules of its own that `generate` does not reproduce (when a beam is complete, what replaces it, when to stop), so
[`beam_search`] implements them.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import DataCollatorForSeq2Seq, DynamicCache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .data import IGNORED, data_pattern

DATA_URL = "https://raw.githubusercontent.com/microsoft/LoRA/main/examples/NLG/data/e2e"
Data = TypeVar("Data", Dataset, DatasetDict)
SPLITS = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}


# ---- data ----


def load_e2e(data_dir: str | PathLike | None = None) -> DatasetDict:
    """
    Load the task's data.

    Args:
        data_dir (`str` or `os.PathLike`, *optional*): Folder, or address of one, that holds train.txt, valid.txt and
            test.txt with one `meaning representation||text` per line. Defaults to the public address of the data.

    Returns:
        [`~datasets.DatasetDict`]: Splits train, validation and test with the columns `mr` and `text`.

    Raises:
        `FileNotFoundError`: If the folder or one of its files is missing, or cannot be reached.
        `ValueError`: If a line has another form; the message has its number.
    """
    root = str(data_dir or DATA_URL).rstrip("/")
    if "://" not in root:
        missing = [name for name in SPLITS.values() if not Path(root, name).is_file()]
        if missing:
            raise FileNotFoundError(f"The data folder {root!r} has no {', '.join(missing)}.")
    files = {split: f"{root}/{name}" for split, name in SPLITS.items()}
    try:
        lines = load_dataset("text", data_files={split: data_pattern(file) for split, file in files.items()})
    except OSError as error:
        raise FileNotFoundError(
            f"The data cannot be had from {root} ({error}). Download {', '.join(SPLITS.values())} from there, and "
            "give their folder as data_dir."
        ) from error
    return DatasetDict({split: _parse(part["text"], files[split]) for split, part in lines.items()})


def _parse(lines: Sequence[str], file: str) -> Dataset:
    rows: dict[str, list[str]] = {"mr": [], "text": []}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        parts = line.strip().split("||")
        if len(parts) != 2 or not all(part.strip() for part in parts):
            raise ValueError(f"{file}, line {number}: expected 'meaning representation||text', found {line[:80]!r}.")
        rows["mr"].append(parts[0])
        rows["text"].append(parts[1])
    if not rows["mr"]:
        raise ValueError(f"{file} is empty.")
    return Dataset.from_dict(rows)


def group_by_mr(data: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The texts of each distinct meaning representation, in the order in which these first appear."""
    groups: dict[str, list[str]] = {}
    for mr, text in zip(data["mr"], data["text"], strict=True):
        groups.setdefault(mr, []).append(text)
    return groups


# ---- encoding ----


def encode_prompts(tokenizer: PreTrainedTokenizerBase, mrs: Sequence[str]) -> list[list[int]]:
    """
    Encode meaning representations as prompts: the BOS token if the tokenizer begins texts with it (LLaMA's does,
    GPT-2's does not), the meaning representation, the EOS token.
    """
    ids = tokenizer(list(mrs), add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id]
    head = bos if bos == tokenizer("")["input_ids"][:1] else []
    return [[*head, *prompt, tokenizer.eos_token_id] for prompt in ids]


def encode_dataset(data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int = 512) -> Data:
    """
    Encode examples as prompt + text + EOS. The loss counts the text and its EOS only.

    Args:
        data ([`~datasets.Dataset`] or [`~datasets.DatasetDict`]): Examples with the columns `mr` and `text`, see
            [`load_e2e`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A tokenizer with an EOS token.
        max_length (`int`, *optional*, defaults to 512): The end of a longer example is cut off.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.DatasetDict`]: The examples with the columns `input_ids`, `labels` (-100
        on the prompt) and `length`.

    Raises:
        `ValueError`: If a prompt alone fills `max_length`, or the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, which ends every text of this task. Set tokenizer.eos_token."
        )

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        prompts: list[list[int]] = encode_prompts(tokenizer, batch["mr"])
        outputs: list[list[int]] = tokenizer([f" {text}" for text in batch["text"]], add_special_tokens=False)[
            "input_ids"
        ]
        rows: dict[str, list] = {"input_ids": [], "labels": [], "length": []}
        mr: str
        prompt: list[int]
        output: list[int]
        for mr, prompt, output in zip(batch["mr"], prompts, outputs, strict=True):
            if len(prompt) >= max_length:
                raise ValueError(f"max_length={max_length} leaves no room for a text after {mr[:80]!r}. Raise it.")
            answer: list[int] = [*output, tokenizer.eos_token_id]
            rows["input_ids"].append([*prompt, *answer][:max_length])
            rows["labels"].append(([IGNORED] * len(prompt) + answer)[:max_length])
            rows["length"].append(len(rows["input_ids"][-1]))
        return rows

    return data.map(encode, batched=True, remove_columns=["mr", "text"], desc="Encoding")


def make_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Make a collator that pads batches on the right to their longest example, with labels of -100 on the padding."""
    tokenizer.padding_side = "right"
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


# ---- decoding ----


@torch.no_grad()
def beam_search(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    num_beams: int = 10,
    length_penalty: float = 0.8,
    no_repeat_ngram_size: int = 4,
    max_new_tokens: int = 64,
    eos_token_ids: Sequence[int] = (50256, 628),
) -> list[list[int]]:
    """
    The beam search of microsoft/LoRA's NLG example, batched over prompts, with a KV cache.

    A beam whose new token is an EOS becomes a candidate, and no other beam takes its place. A candidate's score is the
    sum of its log-probabilities / length^length_penalty. After the last step the remaining beams become candidates
    too. The best candidate wins, and of two equal ones the earlier. A prompt leaves the batch as soon as none of its
    beams can win any more, which changes no result.

    Args:
        model ([`~transformers.PreTrainedModel`]): A decoder-only language model, or PEFT's wrapper around one.
        prompts (`Sequence[Sequence[int]]`): The token ids of each prompt. Prompts may differ in length.
        num_beams (`int`, *optional*, defaults to 10): The number of beams.
        length_penalty (`float`, *optional*, defaults to 0.8): The exponent of the length in a candidate's score.
        no_repeat_ngram_size (`int`, *optional*, defaults to 4): No n-gram of this size occurs twice in the generated
            part. With 0, any n-gram may be repeated.
        max_new_tokens (`int`, *optional*, defaults to 64): The number of steps.
        eos_token_ids (`Sequence[int]`, *optional*, defaults to `(50256, 628)`): The tokens that end a text. 628 is
            GPT-2's blank line.

    Returns:
        `list[list[int]]`: The generated tokens of each prompt, with the EOS token where one was generated.

    Raises:
        `ValueError`: If a prompt is empty or too long for the model, a setting is out of its range, the model is an
            encoder-decoder, or it computes NaN.
    """
    if not prompts:
        return []
    model, cache, prefix = _start(model, len(prompts))
    _check_search(model, prompts, num_beams, no_repeat_ngram_size, max_new_tokens, prefix)
    device = model.device
    accepted = inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    eos = torch.tensor(list(eos_token_ids), device=device)
    best: list[list[int]] = [[] for _ in prompts]
    # Each of the following variables has one entry, or one group of rows, for each prompt that is still searched.
    searched = list(range(len(prompts)))
    best_scores = torch.full((len(prompts),), -torch.inf, device=device)
    tokens, mask = _pad_left(prompts, device)
    mask = torch.nn.functional.pad(mask, (prefix, 0), value=1)
    running = history = None

    with evaluating(model):
        for step in range(max_new_tokens):
            positions = {"position_ids": mask.cumsum(1).sub(1).clamp_min(0)[:, -tokens.shape[1] :]}
            output = model(
                input_ids=tokens,
                attention_mask=mask,
                use_cache=True,
                **{cache_argument(model): cache},
                **(positions if "position_ids" in accepted else {}),
                **last_only,
            )
            scores = output.logits[:, -1].float()
            if history is not None:
                _ban_repeated_ngrams(scores, history, no_repeat_ngram_size)
            scores = scores.log_softmax(-1)
            vocabulary = scores.shape[-1]
            # The first step expands one row of each prompt, and later steps expand all its beams.
            rows_each = 1 if history is None else num_beams
            if running is not None:
                scores = scores + running.view(-1, 1)
            running, chosen = scores.view(len(searched), -1).topk(num_beams, dim=1)
            first_rows = torch.arange(len(searched), device=device)[:, None] * rows_each
            parents = (first_rows + chosen // vocabulary).view(-1)
            new = (chosen % vocabulary).view(-1, 1)
            history = new if history is None else torch.cat([history[parents], new], dim=1)

            length = step + 1
            ended = torch.isin(new.view_as(running), eos)
            is_candidate = ended if length < max_new_tokens else torch.ones_like(ended)
            candidates = (running / length**length_penalty).masked_fill(~is_candidate, -torch.inf)
            winners = candidates.argmax(1)
            values = candidates.gather(1, winners[:, None]).squeeze(1)
            for index in (values > best_scores).nonzero().view(-1).tolist():
                best[searched[index]] = history[index * num_beams + int(winners[index])].tolist()
            best_scores = torch.maximum(best_scores, values)
            running = running.masked_fill(ended, -torch.inf)

            # A sum of log-probabilities never grows, so the best running beam cannot reach more than this.
            top = running.amax(1)
            reachable = torch.maximum(top / (length + 1) ** length_penalty, top / max_new_tokens**length_penalty)
            going_on = (reachable > best_scores).nonzero().view(-1)
            if length == max_new_tokens or not len(going_on):
                break
            rows = (going_on[:, None] * num_beams + torch.arange(num_beams, device=device)).view(-1)
            searched = [searched[index] for index in going_on.tolist()]
            best_scores, running, history = best_scores[going_on], running[going_on], history[rows]
            cache.batch_select_indices(parents[rows])
            mask = torch.nn.functional.pad(mask[parents[rows]], (0, 1), value=1)
            tokens = history[:, -1:]

    if not all(best):
        raise ValueError("The model computes NaN, so no text can be decoded. Did the training diverge?")
    return best


def _start(model: Any, rows: int) -> tuple[PreTrainedModel, DynamicCache, int]:
    """
    Find the model to call; returns it, its cache for that number of rows, and how many positions the cache already
    has. PEFT adapts the model inside of its wrapper, so that model is called. With prefix tuning, the wrapper
    would start a new cache with its prefix at every step, so the prefix is put into the cache here.
    """
    if isinstance(model, PreTrainedModel):
        return model, DynamicCache(config=model.config), 0
    base, config = model.get_base_model(), model.active_peft_config
    if not config.is_prompt_learning:
        return base, DynamicCache(config=base.config), 0
    return base, model.get_prompt(rows), config.num_virtual_tokens


def cache_argument(model: PreTrainedModel) -> str:
    """The name of the argument that is a model's cache. transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _check_search(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    num_beams: int,
    ngram_size: int,
    max_new_tokens: int,
    prefix: int,
) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; this beam search is for decoders.")
    config = model.config.get_text_config()
    if not 1 <= num_beams <= config.vocab_size:
        raise ValueError(f"num_beams={num_beams} has to lie between 1 and the vocabulary's {config.vocab_size}.")
    if ngram_size < 0:
        raise ValueError(f"no_repeat_ngram_size={ngram_size} has to be 0 (allow all) or more.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} has to be at least 1.")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("A prompt has no tokens.")
    longest = prefix + max(len(prompt) for prompt in prompts) + max_new_tokens
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and longest > room:
        raise ValueError(f"The longest prompt and max_new_tokens={max_new_tokens} take {longest} of {room} positions.")


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of shape (number of prompts, longest prompt)."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return tokens, mask


def _ban_repeated_ngrams(logits: torch.Tensor, history: torch.Tensor, size: int) -> None:
    """Set the logits of tokens that would complete an n-gram of a row's history to -inf, in place."""
    if not 1 <= size <= history.shape[1]:
        return
    grams = history.unfold(1, size, 1)
    last = history[:, history.shape[1] - size + 1 :]
    row, start = (grams[..., :-1] == last[:, None]).all(-1).nonzero(as_tuple=True)
    logits[row, grams[row, start, -1]] = -torch.inf


def eos_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: EOS, and a blank line if that is one token, as GPT-2's 628 is."""
    blank_line = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    return [tokenizer.eos_token_id, *(blank_line if len(blank_line) == 1 else [])]


def decode_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of generated tokens: it ends at EOS or at a blank line, and is stripped."""
    text = str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
    return text.split(tokenizer.eos_token)[0].split("\n\n")[0].strip()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and afterwards back into the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
