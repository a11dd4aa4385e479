"""Every choice that defines an adapter, validated once."""

import operator
import re
import reprlib
from dataclasses import asdict, dataclass, field
from typing import Any

from .methods import METHODS, Method
from .spectrum import check_threshold

# All linears but heads and embeddings, as in PEFT.
ALL_LINEAR = "all-linear"
V_POSITIONS = ("back", "front", "none")
FACTORS = ("recompute", "save")
MOST_DIGITS_OF_A_BUDGET = 30
# A text of this length can name all layers of any model.
LONGEST_CHOICE_OF_LAYERS = 10_000


@dataclass
class SaraArguments:
    """
    The choices that define a SARA or a Mo-SARA adapter. This is a plain dataclass, which
    [`~transformers.HfArgumentParser`] can parse together with [`~transformers.TrainingArguments`]. The defaults are
    those of the paper's appendix A.

    The learning rate is not part of these arguments: it belongs to [`~transformers.TrainingArguments`], whose default
    of 5e-5 is far too small here. Start from these values:

    | learning rate | SARA | Mo-SARA |
    |---|---|---|
    | up to a few hundred steps | start at 0.02; try 0.008 and 0.05 | start at 0.2; try 0.1 and 0.3 |
    | thousands of steps | 0.001 to 0.01 | 0.03 to 0.07 |

    Args:
        method (`str`, *optional*, defaults to `"sara"`):
            `"sara"` trains a low-rank update whose rank follows from each weight's singular values; `"mo_sara"` trains
            only vectors between the weight's own frozen singular vectors.
        threshold (`float`, *optional*):
            The number in (0, 1] that decides the ranks. A larger threshold gives larger ranks and more trained
            parameters. If it is left out, it is 0.01 for SARA and 0.5 for Mo-SARA. These are the paper's values, and
            sensible ones to start from. `hf-sara plan` shows the ranks and parameters that a value gives your model.
            The exact rule is Algorithm 1 of the paper: the rank `k` of a weight is the smallest number of its largest
            singular values whose sum is at least `threshold` times the sum of all of its singular values.
        parameter_budget (`str` or `int`, *optional*):
            Number of trained parameters that decides the threshold: a count (`200000`), or a share of base plus
            trained parameters (`"0.1%"`). The largest threshold that stays within the budget is taken.
        num_heads (`int`, *optional*, defaults to 5):
            Mo-SARA: number of parallel vectors of singular values that the router mixes. With one vector there is no
            router.
        target_modules (`list[str]`, *optional*):
            Names of the linear modules to adapt (`["q_proj", "v_proj"]`; one projection of a fused module is
            `"c_attn.q"`), or one regular expression that the whole name of a site must match, or `"all-linear"` for
            all linear modules but heads and embeddings. If it is left out, the query and value projections are
            adapted, and of a multi-modal model those of its text model.
        exclude_modules (`list[str]`, *optional*):
            Names of linear modules that are not adapted, although `target_modules` or its default chooses them. They
            are matched as in `target_modules`.
        layers (`str`, *optional*):
            Layers to adapt, counted from 0: `"0-7,12"`. If it is left out, all layers are adapted.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained in full and saved with the adapter, such as heads, norms or embeddings. They are
            matched as in `target_modules`. If it is left out, these are the modules of the head for a task that makes
            a new one: classification, question answering, multiple choice and reward models. `[]`, or `none` on a
            command line, is no module.
        trainable_token_indices (`list[int]`, *optional*):
            Rows of the input embedding, and of an output embedding that is tied to it, that are trained and saved with
            the adapter. These are the ids of their tokens.
        dropout (`float`, *optional*, defaults to 0.05):
            Dropout on the input of the update, in [0, 1).
        singular_values (`bool`, *optional*, defaults to `True`):
            SARA: whether the update has the trained vector `S` in its middle. `False` is an ablation of Table 4.
        zero_init_vh (`bool`, *optional*, defaults to `False`):
            SARA: whether `Vh` starts at zero, so that the update starts at zero, and the model computes what the base
            computes until the first step. `True` is an ablation of Table 4.
        v_position (`str`, *optional*, defaults to `"back"`):
            Mo-SARA: the trained scale `v` multiplies the update's output (`"back"`), its input (`"front"`), or is left
            out (`"none"`). The latter two are ablations of Table 4.
        factors (`str`, *optional*, defaults to `"recompute"`):
            Mo-SARA: where frozen factors come from when an adapter is loaded. With `"recompute"`, they are computed
            again from the base weights and verified, so that an adapter takes kilobytes. With `"save"`, they are saved
            with the adapter, so that the base may have any dtype.

    Raises:
        `ValueError`: for a value outside its range, or an option of the other method.
    """

    method: str = field(default="sara", metadata={"choices": METHODS, "help": "sara or mo_sara."})
    threshold: float | None = field(
        default=None,
        metadata={
            "help": "Decides the ranks, in (0, 1]. A larger value gives larger ranks and more parameters. 0.01 is "
            "sensible for sara, and 0.5 for mo_sara; these are the defaults. hf-sara plan shows what a value means "
            "for your model."
        },
    )
    parameter_budget: str | None = field(
        default=None,
        metadata={"help": "Solve the threshold for a budget of trained parameters: a count, or a share like 0.1%%."},
    )
    num_heads: int = field(default=5, metadata={"help": "Mo-SARA: number of vectors that the router mixes."})
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the linear modules to adapt, or one regular expression, or all-linear. "
            "Default: query and value."
        },
    )
    exclude_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of linear modules that are not adapted, or one regular expression."},
    )
    layers: str | None = field(default=None, metadata={"help": "Layers to adapt, from 0: 0-7,12. Default: all."})
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of modules to train in full and to save, or one regular expression. "
            "Default: the head of a task that makes a new one. none: no module."
        },
    )
    trainable_token_indices: list[int] | None = field(
        default=None, metadata={"help": "Ids of the tokens whose rows of the embedding are trained."}
    )
    dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the update, in [0, 1)."})
    singular_values: bool = field(
        default=True, metadata={"help": "SARA: train S in the middle of the update (without: ablation)."}
    )
    zero_init_vh: bool = field(default=False, metadata={"help": "SARA: start Vh at zero (ablation)."})
    v_position: str = field(
        default="back",
        metadata={"choices": list(V_POSITIONS), "help": "Mo-SARA: where v multiplies (front, none: ablations)."},
    )
    factors: str = field(
        default="recompute",
        metadata={"choices": list(FACTORS), "help": "Mo-SARA: recompute the frozen factors at load, or save them."},
    )

    def __post_init__(self):
        _choice("method", self.method, tuple(METHODS))
        _choice("v_position", self.v_position, V_POSITIONS)
        _choice("factors", self.factors, FACTORS)
        if self.threshold is not None:
            if self.parameter_budget is not None:
                raise ValueError(
                    f"threshold={self.threshold} and parameter_budget={self.parameter_budget!r} exclude each other: "
                    "the budget solves the threshold. Give one of them."
                )
            check_threshold(self.threshold)
        if self.parameter_budget is not None:
            self.parameter_budget = str(self.parameter_budget)
            parse_budget(self.parameter_budget)
        if isinstance(self.num_heads, bool) or not isinstance(self.num_heads, int) or self.num_heads < 1:
            raise ValueError(f"num_heads={self.num_heads!r} has to be a whole number of at least 1.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} has to lie in [0, 1).")
        for name in ("target_modules", "exclude_modules"):
            given = getattr(self, name)
            names = [given] if isinstance(given, str) else given
            listed = isinstance(names, (list, tuple, set, frozenset))
            if names is not None and not (listed and all(isinstance(one, str) and one for one in names)):
                raise ValueError(f"{name}={given!r} has to be a list of names, or one regular expression.")
            setattr(self, name, None if names is None else list(names))
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules is empty. Name at least one module, or leave it out for query and value.")
        if self.target_modules is not None and ALL_LINEAR in self.target_modules and len(self.target_modules) > 1:
            raise ValueError(f"target_modules={self.target_modules} has to be '{ALL_LINEAR}' alone, or names.")
        # An empty list excludes nothing.
        self.exclude_modules = self.exclude_modules or None
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        if self.modules_to_save is not None:
            names = list(self.modules_to_save)
            if not all(isinstance(name, str) and name for name in names) or ("none" in names and len(names) > 1):
                raise ValueError(f"modules_to_save={names} has to be a list of names, or 'none' alone.")
            # A list on a command line cannot be empty.
            self.modules_to_save = [] if names == ["none"] else names
        self._check_tokens()
        if self.layers is not None:
            # YAML reads a single layer as a number.
            self.layers = str(self.layers)
            parse_layers(self.layers)
        self.resolved_method().check()

    def _check_tokens(self) -> None:
        given = self.trainable_token_indices
        if given is None:
            return
        try:
            listed = [given] if isinstance(given, int) else list(given)
            tokens = [operator.index(token) for token in listed]
        except TypeError:
            listed = tokens = [-1]
        wrong = any(isinstance(token, bool) for token in listed) or any(token < 0 for token in tokens)
        if wrong or len(set(tokens)) != len(tokens):
            raise ValueError(
                f"trainable_token_indices={given!r} has to be a list of different token ids, which are whole numbers "
                "from 0 on."
            )
        self.trainable_token_indices = tokens or None

    def resolved_method(self) -> Method:
        """The method, with these arguments as its options."""
        return METHODS[self.method](self)

    def resolved_threshold(self) -> float:
        """The threshold in force: the given one, else the method's default."""
        return METHODS[self.method].default_threshold if self.threshold is None else self.threshold

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown. Choose one of: {', '.join(choices)}.")


def parse_budget(budget: str) -> tuple[float | None, int | None]:
    """Read a parameter budget: `"0.1%"` gives `(0.001, None)`, `"200000"` gives `(None, 200000)`."""
    text = str(budget).strip().replace("_", "").replace(",", "")
    # A regular expression, or a conversion, could take hours for a text of a million digits.
    text = text if len(text) <= MOST_DIGITS_OF_A_BUDGET else ""
    share = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*%", text)
    if share and 0.0 < float(share.group(1)) < 100.0:
        return float(share.group(1)) / 100.0, None
    if re.fullmatch(r"\d+", text) and int(text) > 0:
        return None, int(text)
    asked = f" Was '{text}%' meant?" if re.fullmatch(r"\d*\.\d+", text) and float(text) > 0.0 else ""
    raise ValueError(
        f"parameter_budget={reprlib.repr(budget)} is neither a count of parameters such as 200000 nor a share "
        f"of the model such as '0.1%'.{asked}"
    )


def allowed_parameters(budget: str, base: int) -> int:
    """The largest number of trained parameters that a budget allows beside `base` parameters of the base model."""
    share, count = parse_budget(budget)
    if share is None:
        assert count is not None
        return count
    # trained / (base + trained) <= share
    return int(share * base / (1.0 - share))


def parse_layers(layers: str) -> set[int]:
    """Read a choice of layers: `"0-2,5"` gives `{0, 1, 2, 5}`."""
    text = str(layers)
    if len(text) > LONGEST_CHOICE_OF_LAYERS:
        raise ValueError(
            f"layers={reprlib.repr(text)} has {len(text):,} characters, and at most {LONGEST_CHOICE_OF_LAYERS:,} are "
            "read. Write ranges, like '0-7,12'."
        )
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        if match is None:
            raise ValueError(
                f"layers={layers!r}: cannot read {part!r}. Write single layers and ranges, like '0-7,12'. A layer is "
                "a number of at most four digits."
            )
        first = int(match.group(1))
        last = int(match.group(2)) if match.group(2) else first
        if last < first:
            raise ValueError(f"layers={layers!r}: the range {part.strip()!r} runs backwards.")
        chosen.update(range(first, last + 1))
    return chosen
