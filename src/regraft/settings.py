"""Every setting of every stage, typed, validated and explained once.

The same models make the command line's flags, are a recipe's blocks and are written into artifacts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from cyclopts import Parameter
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from regraft.data.demo import is_demo
from regraft.data.sources import DataSource, words_of_first
from regraft.defence.prompt import DEFENCE_PROMPT
from regraft.errors import RegraftError
from regraft.evaluation.judge import DEFAULT_WINDOW, KeywordJudge
from regraft.evaluation.keywords import DEFAULT_JUDGE, KEYWORD_JUDGES, keyword_judge
from regraft.evaluation.tradeoff import Reference
from regraft.heads.score import CANDIDATES, WINDOW, Criterion, Mode, Scoring
from regraft.importance.score import Method
from regraft.models.ablation import EPS, AblationTarget
from regraft.models.anatomy import LinearAnatomy
from regraft.models.load import DTypeName, Placement
from regraft.pruning.masks import Pattern, Scope
from regraft.pruning.patterns import assign_patterns, parse_override
from regraft.pruning.pruner import Order, Pruner
from regraft.restoration.gain import Constraint
from regraft.restoration.selection import RankingScope


class Settings(BaseModel):
    """Frozen; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _default(settings: Settings, name: str) -> Any:
    return type(settings).model_fields[name].default


class ComputeSettings(Settings):
    """Where and how to run the model."""

    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes the accelerator.")
    dtype: DTypeName = Field(
        "auto",
        description="Of the computation: float32 on CPU, where bfloat16 is often far slower, the "
        "checkpoint's own elsewhere.",
    )
    batch_size: int = Field(8, ge=1, description="Examples in one forward pass.")
    placement: Placement = Field(
        "resident",
        description="resident: the whole model on the device; streamed, for models larger than "
        "it: one decoder layer at a time (prune, statistics, gain), or spread over all devices and "
        "host memory (heads, eval, searches; needs accelerate).",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the checkpoint."
    )


def _words(_type: Any, tokens: Sequence[Any]) -> DataSource:
    return DataSource.model_validate([token.value for token in tokens])


def _several(_type: Any, tokens: Sequence[Any]) -> tuple[DataSource, ...]:
    """Words of several data sets in a row."""
    words, found = [str(token.value) for token in tokens], []
    while words:
        count = words_of_first(words)
        found.append(DataSource.model_validate(words[:count]))
        words = words[count:]
    return tuple(found)


_ONE_OR_TWO_WORDS = Parameter(
    converter=_words, n_tokens=-1, consume_multiple=True, accepts_keys=False
)
_ONE_WORD = Parameter(n_tokens=1, accepts_keys=False)  # no converter is asked inside of settings


Data = Annotated[
    DataSource,
    _ONE_WORD,
    Parameter(help="demo:calibration, vlguard PATH (train.json by its images) or a .jsonl file."),
]


Suite = Annotated[
    DataSource,
    _ONE_OR_TWO_WORDS,
    Parameter(
        help="demo:test, a .jsonl file, or NAME PATH: safebench, vlguard, ch3ef, mm-safetybench, "
        "mossbench, xstest, mmbench, docvqa, prompts (AdvBench and its like), benign. With "
        "#harmful or #harmless behind it these prompts alone."
    ),
]


Suites = Annotated[
    tuple[DataSource, ...],
    Parameter(converter=_several, n_tokens=-1, consume_multiple=True, accepts_keys=False),
    Parameter(
        help="One or, the flag repeated, several: demo:test, a .jsonl file, or NAME PATH with "
        "safebench, vlguard, ch3ef, mm-safetybench, mossbench, xstest, mmbench, docvqa, prompts "
        "(AdvBench and its like), benign. With #harmful or #harmless behind it these prompts alone."
    ),
]


Validation = Annotated[DataSource | None, _ONE_WORD]


class CalibrationSettings(Settings):
    """Harmful prompts with refusals (D^s) and harmless ones with answers (D^u)."""

    data: Data = DataSource(name="demo", split="calibration")
    samples: int = Field(128, ge=1, description="Drawn of each kind; fewer where there are fewer.")
    seed: int = Field(0, description="Of the draw.")
    responses: Literal["given", "self"] = Field(
        "given",
        description="given: the data set's. self: the dense model writes them greedily, and those "
        "are kept that refuse a harmful prompt or do not refuse a harmless one.",
    )
    max_response_tokens: int = Field(
        64, ge=1, description="Length of a response that the dense model writes."
    )


class PruneSettings(Settings):
    """What is pruned, by which criterion, and how much of it."""

    method: Method = Field("wanda", description="wanda, sparsegpt, snip or magnitude.")
    sparsity: float = Field(0.5, gt=0, lt=1, description="Share of prunable weights set to 0.")
    n_m: str | None = Field(
        None, description="N:M pattern such as 2:4, kept of each M inputs; instead of sparsity."
    )
    scope: Scope | None = Field(
        None,
        description="Weights compete within their row or the matrix; each method's own if not "
        "given: row for wanda, matrix for the others (SparseGPT: of each block of columns).",
    )
    ignore: tuple[str, ...] = Field(
        (),
        description="Weights left dense, as a pattern: `layers.0.*`, `*.down_proj`; repeat the "
        "flag for more.",
    )
    overrides: tuple[str, ...] = Field(
        (),
        description="Another sparsity for some weights: `*.v_proj=0.3`, `layers.0.*=2:4`; repeat "
        "for more, the last that fits counts.",
    )
    calibrate_on: Literal["harmless", "both"] = Field(
        "harmless",
        description="Harmless prompts and answers (D^u, the paper's), or harmful prompts and "
        "refusals (D^s) as well.",
    )
    damp: float = Field(0.01, gt=0, le=1, description="SparseGPT: share of the mean diagonal.")
    block: int = Field(128, ge=1, description="SparseGPT: columns pruned before an update.")
    order: Order = Field(
        "sequential",
        description="Layer by layer on pruned inputs (the paper's), or one-shot. SNIP and "
        "magnitude are always one-shot.",
    )

    @model_validator(mode="after")
    def _check(self) -> PruneSettings:
        try:
            self.pattern()
            self._overrides()
        except RegraftError as error:
            raise ValueError(str(error)) from error
        return self

    def unread(self) -> str | None:
        """What was set and changes nothing, in words."""
        if self.n_m is not None and self.sparsity != _default(self, "sparsity"):
            return f"`n_m` {self.n_m} takes the place of `sparsity` {self.sparsity:g}"
        return None

    def pattern(self) -> Pattern:
        """The pattern that these settings ask for, overrides aside."""
        if self.n_m is not None:
            return Pattern.parse_n_m(self.n_m)
        return Pattern(self.sparsity, self._scope)

    def patterns(self, linears: Iterable[LinearAnatomy]) -> Mapping[LinearAnatomy, Pattern]:
        """The pattern of each weight that is to be pruned.

        Raises:
            RegraftError: see `assign_patterns`.
        """
        return assign_patterns(linears, self.pattern(), self._overrides(), self.ignore)

    def pruner(self) -> Pruner:
        """The method that these settings ask for."""
        return Pruner(self.method, self.order, self.damp, self.block)

    @property
    def _scope(self) -> Scope:
        return self.scope or ("row" if self.method == "wanda" else "matrix")

    def _overrides(self) -> list[tuple[str, Pattern]]:
        return [parse_override(text, self._scope) for text in self.overrides]


class HeadSettings(Settings):
    """Head scoring by ablation on D^s prompts."""

    r_max: int = Field(5, ge=1, description="Rank of the subspaces that Ships compares.")
    target: AblationTarget = Field(
        "all", description="Scale the head's query, key, value or all three."
    )
    eps: float = Field(EPS, ge=0, lt=1, description="The scale.")
    mode: Mode = Field(
        "exact",
        description="exact: every head is ablated exactly. screened: all heads are estimated at "
        "a few positions of each prompt, and the best ones then ablated exactly.",
    )
    window: int = Field(
        WINDOW,
        ge=1,
        description="Screening: positions at which effects are followed, the last and those that "
        "it attends to most.",
    )
    candidates: int = Field(
        CANDIDATES, ge=1, description="Screening: best heads by each criterion, scored exactly."
    )
    tokens_per_pass: int | None = Field(
        None,
        ge=1,
        description="Tokens (rows x length) in one pass, which bounds memory; if not given, what "
        "fits the device.",
    )

    def scoring(self) -> Scoring:
        """These settings as the scoring of heads takes them."""
        return Scoring(**self.model_dump())


class StatisticsSettings(Settings):
    """What is gathered on D^s and D^u, from which weights are ranked."""

    score: Method = Field("wanda", description="For which importance: wanda, sparsegpt or snip.")


DEFAULT_BUDGET = 5.0  # per 10,000 pruned
_OF_HEADS = ("heads", "criterion", "top_heads")
_OF_HSR = ("score", "p", "p_max", "scope")
_OF_GAIN = (
    "within",
    "utility_weight",
    "constraint",
    "utility_share",
    "loss",
    "steps",
    "trust",
    "batch",
)
RestorationMethod = Literal["hsr", "hsr-a", "set-difference", "random", "gain"]


class RealignSettings(Settings):
    """Which pruned weights come back."""

    method: RestorationMethod = Field(
        "hsr",
        description="hsr selects single weights in heads, hsr-a whole heads; gain those whose "
        "return is predicted to help safety and utility, step by step; set-difference "
        "(Wei et al.) those that matter for safety and not for utility; random is a control.",
    )
    budget: float | None = Field(
        None,
        gt=0,
        lt=10_000,
        description="Restored weights per 10,000 pruned ones; of hsr it takes the place of q. "
        "Where gain, set-difference or random are given neither this nor a count it is "
        f"{DEFAULT_BUDGET:g}.",
    )
    count: int | None = Field(None, ge=1, description="Restored weights; instead of the budget.")
    score: Method = Field(
        "wanda",
        description="Importance I^s and I^u: wanda, sparsegpt, snip or magnitude (which is the "
        "same for both, so that only q above p selects anything).",
    )
    heads: Literal["top", "random", "all"] = Field(
        "top", description="The top-scored heads, as many random ones (a control), or all."
    )
    criterion: Criterion = Field("ships", description="Rank heads by Ships or query-level KL.")
    top_heads: int = Field(10, ge=1, description="How many heads (h).")
    q: float = Field(0.5, gt=0, le=1, description="Top share by safety importance.")
    p: float | None = Field(
        None, ge=0, lt=1, description="Share kept by the pruner; 1 - sparsity if not given."
    )
    p_max: float | None = Field(
        None, gt=0, le=1, description="Outer bound by utility importance; p + 0.2 if not given."
    )
    scope: RankingScope = Field(
        "row", description="Weights compete within their row, the matrix or the head."
    )
    head_seed: int = Field(0, description="Of random heads and of random weights.")
    within: Literal["all", "attention", "heads"] = Field(
        "all",
        description="gain: weights come back in all linears, in attention, or in the chosen heads.",
    )
    utility_weight: float = Field(
        1.0,
        ge=0,
        description="gain: how much utility counts beside safety, at first where a multiplier "
        "moves it.",
    )
    constraint: Constraint = Field(
        "utility-gain",
        description="gain: utility-gain takes only weights whose gain in utility is at least "
        "`utility_share` of that in safety; lagrangian moves the utility weight so that harmless "
        "prompts get no further from the dense model than pruning left them (or than it is itself, "
        "where pruning refuses less); both; or none.",
    )
    utility_share: float = Field(
        0.0, ge=0, description="gain: see constraint; 0 takes all that cost no utility."
    )
    loss: Literal["distil", "given"] = Field(
        "distil",
        description="gain: what a response costs, its divergence from the dense model's (without "
        "prompts that the dense model answers otherwise than they should be), or the cross-entropy "
        "against the given one.",
    )
    steps: int = Field(
        20,
        ge=1,
        description="gain: weights come back in at most so many steps, gradients anew in each.",
    )
    pushes: int = Field(
        0,
        ge=0,
        le=20,
        description="gain: so many times 0.75 % of the budget come back in a step that looks at "
        "utility nearly alone, and as many in a last one at safety, together half of the budget at "
        "most; for a search, which takes the best within its bounds.",
    )
    trust: float = Field(
        1.0,
        gt=0,
        description="gain: a step tries no more weights than are predicted to lower the loss by "
        "this share of it, and takes those with which it falls most.",
    )
    batch: int = Field(
        128,
        ge=2,
        description="gain: prompts of each kind in a step; of more samples than that they are "
        "drawn anew for each, those on which the model falls short likelier.",
    )
    swap: bool = Field(
        False,
        description="gain: prune a kept weight of the same row or N:M group for each that comes "
        "back, so that sparsity stays exactly as it was.",
    )

    @property
    def random(self) -> bool:
        """Whether `head_seed` decides what comes back."""
        if self.method == "gain":
            return self.within == "heads" and self.heads == "random"
        return self.method == "random" or (
            self.method in ("hsr", "hsr-a") and self.heads == "random"
        )

    @model_validator(mode="before")
    @classmethod
    def _default_budget(cls, given: Any) -> Any:
        """Written out, so that an artifact tells what it was made with."""
        if not isinstance(given, Mapping) or given.get("method", "hsr") in ("hsr", "hsr-a"):
            return given
        if given.get("budget") is not None or given.get("count") is not None:
            return given
        return {**given, "budget": DEFAULT_BUDGET}

    @model_validator(mode="after")
    def _check(self) -> RealignSettings:
        if self.p is not None and self.p_max is not None and self.p >= self.p_max:
            raise ValueError(f"p is {self.p} and p_max {self.p_max}; p < p_max is needed")
        if self.budget is not None and self.count is not None:
            raise ValueError("`budget` and `count` say the same thing; give one of them")
        if self.method == "hsr-a" and self.amount is not None:
            raise ValueError("hsr-a restores whole heads: give `top_heads`, not a budget")
        if self.method == "set-difference" and self.score in ("sparsegpt", "snip"):
            raise ValueError(
                f"set-difference ranks the weights of all linears, and {self.score} statistics are "
                "kept for those of attention alone; give `score: wanda`"
            )
        if self.swap and self.method != "gain":
            raise ValueError(f"only gain can swap, not {self.method}")
        if self.pushes and self.method != "gain":
            raise ValueError(f"only gain has pushes, not {self.method}")
        return self

    def unread(self) -> str | None:
        """What was set and changes nothing: the first of it, in words."""
        if self.method == "hsr" and self.ranked and self.q != _default(self, "q"):
            return "a budget or a count takes the place of `q`"
        not_read = {
            "hsr": _OF_GAIN,
            "hsr-a": ("q", *_OF_HSR, *_OF_GAIN),
            "set-difference": ("q", "p_max", *_OF_HEADS, *_OF_GAIN),
            "random": ("q", *_OF_HSR, *_OF_HEADS, *_OF_GAIN),
            "gain": ("q", *_OF_HSR, *(() if self.within == "heads" else _OF_HEADS)),
        }[self.method]
        for name in not_read:
            if getattr(self, name) != _default(self, name):
                in_heads = self.method == "gain" and name in _OF_HEADS
                but = " unless `within` is heads" if in_heads else ""
                return f"`{name}` changes nothing with {self.method}{but}"
        return None

    @property
    def amount(self) -> float | None:
        """The budget or the count, whichever is given."""
        return self.count if self.budget is None else self.budget

    @property
    def ranked(self) -> bool:
        """Whether weights are ranked and the best k taken, rather than a set selected."""
        return self.method not in ("hsr", "hsr-a") or self.amount is not None

    @property
    def by_heads(self) -> bool:
        """Whether scored heads decide where weights come back."""
        asked = self.within == "heads" if self.method == "gain" else self.method.startswith("hsr")
        return asked and self.heads == "top"

    @property
    def needs_statistics(self) -> bool:
        """Whether weights are ranked by something that must be gathered from data first."""
        return self.method in ("hsr", "set-difference") and self.score != "magnitude"

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients are taken, for the ranking or for its statistics."""
        return self.method == "gain" or (self.needs_statistics and self.score == "snip")

    def how_many(self, pruned: int) -> int:
        """How many of `pruned` weights come back at most."""
        if self.count is not None:
            return min(self.count, pruned)
        return int((self.budget or 0) * pruned / 10_000)

    def selection(self) -> RealignSettings:
        """These settings without those that only name and store the result."""
        return RealignSettings(**self.model_dump(include=set(RealignSettings.model_fields)))


class SearchSettings(Settings):
    """How many weights of a ranking come back, chosen on validation prompts."""

    validation: Validation = Field(
        None,
        description="Harmful and harmless prompts, none of which should be evaluated on. The "
        "bundled model or data come with some; any other needs its own.",
    )
    validation_limit: int | None = Field(
        None, ge=1, description="Use only the first of these prompts, of each kind."
    )
    points: int = Field(
        8,
        ge=1,
        description="Numbers of restored weights to try, evenly over the ranking; before and after "
        "every push of gain as well.",
    )
    most: float | None = Field(
        None, gt=0, description="Restored per 10,000 at most; the whole ranking if not given."
    )
    target_asr: float | None = Field(
        None, ge=0, le=100, description="Take the fewest weights that bring ASR (%) down to this."
    )
    target_rsr: float | None = Field(
        None, description="Take the fewest weights that bring RSR (%) up to this."
    )
    over_refusal: float = Field(
        1.0,
        description="Bound: points of over-refusal above the reference.",
    )
    utility: float = Field(
        0.0, ge=0, description="Bound: points of utility below the pruned model."
    )
    reference: Reference = Field(
        "higher",
        description="Whose over-refusal is the reference: the pruned model's, the dense one's, or "
        "the higher of both. Where pruning took refusals of harmless prompts too, a model with its "
        "safety back may refuse as the dense one did.",
    )

    @model_validator(mode="after")
    def _check(self) -> SearchSettings:
        if self.target_asr is not None and self.target_rsr is not None:
            raise ValueError("`target_asr` and `target_rsr` exclude each other; give one of them")
        return self


Swept = Literal["sparsity", "q", "top-heads", "budget"]  # what `regraft sweep` varies


TUNABLE = ("hsr", "set-difference", "gain")


class TuneSettings(Settings):
    """Which settings of a method are tried, and how many times.

    Every RANGE is a lowest and a highest value. Tried as well are scope (hsr, set-difference),
    criterion (hsr), within and constraint (gain).
    """

    trials: int = Field(
        40, ge=1, description="Finished trials in all; the same command goes on to more."
    )
    sampler_seed: int = Field(
        0, ge=0, description="With one worker and the same seed the same trials come again."
    )
    random_trials: int = Field(
        10, ge=1, description="Trials at random before TPE learns from them."
    )
    workers: int = Field(1, ge=1, description="Processes that share the trials.")
    devices: tuple[str, ...] = Field(
        (), description="Those of the workers, in turn; if not given, --device. Repeat the flag."
    )
    keep: tuple[str, ...] = Field(
        (), description="A setting that stays as given, such as scope; repeat the flag for more."
    )
    q_range: tuple[float, float] = Field(
        (0.01, 1.0), description="hsr: q, on a log scale, where no --budget takes its place."
    )
    p_range: tuple[float, float] = Field(
        (0.0, 0.4), description="set-difference: p, from the share on that pruning kept."
    )
    p_max_range: tuple[float, float] = Field(
        (0.05, 0.5), description="hsr: p_max, from p on, or from the share that pruning kept."
    )
    top_heads_range: tuple[int, int] = Field((1, 32), description="hsr: how many heads.")
    r_max_range: tuple[int, int] = Field(
        (1, 10), description="hsr by ships: rank of the subspaces."
    )
    utility_weight_range: tuple[float, float] = Field(
        (0.1, 10.0), description="gain: on a log scale."
    )
    utility_share_range: tuple[float, float] = Field(
        (0.0, 1.0), description="gain: what utility's gain must be of safety's, at least."
    )
    trust_range: tuple[float, float] = Field((0.1, 1.0), description="gain: on a log scale.")
    steps_range: tuple[int, int] = Field((5, 40), description="gain: on a log scale.")

    @model_validator(mode="after")
    def _check(self) -> TuneSettings:
        for name in type(self).model_fields:
            if not name.endswith("_range"):
                continue
            low, high = getattr(self, name)
            from_zero = name in ("p_range", "utility_share_range")
            if not (low > 0 or (from_zero and low == 0)) or low > high:
                raise ValueError(f"{name} is {low} to {high}; 0 < lowest <= highest is needed")
        return self


class DefenceSettings(Settings):
    """A defence at inference, which leaves the weights as pruning left them."""

    method: Literal["adashield", "refusal-direction"] = Field(
        "adashield",
        description="adashield: a defence prompt around the user's text. refusal-direction: the "
        "difference of means of harmful and harmless prompts added to the hidden states.",
    )
    prompt: str = Field(
        DEFENCE_PROMPT,
        min_length=1,
        description="AdaShield: the text; if not given, AdaShield-S's scheme in our own words.",
    )
    layer: int | None = Field(
        None,
        ge=0,
        description="Direction: the decoder layer behind which it is taken and added; if not "
        "given, chosen on the validation prompts from the middle layers.",
    )
    strength: float | None = Field(
        None,
        gt=0,
        description="Direction: how many differences of means are added; if not given, chosen on "
        "the validation prompts.",
    )
    strengths: tuple[float, ...] = Field(
        (0.25, 0.5, 1.0, 1.5, 2.0),
        min_length=1,
        description="Direction: those to choose from; repeat the flag for more.",
    )
    validation: Validation = Field(
        None,
        description="Direction: harmful and harmless prompts on which layer and strength are "
        "chosen, none of which should be evaluated on. The bundled model or data come with some; "
        "any other needs its own.",
    )
    validation_limit: int | None = Field(
        None, ge=1, description="Direction: use only the first of these prompts, of each kind."
    )
    max_over_refusal: float = Field(
        5.0,
        ge=0,
        le=100,
        description="Direction: how many percentage points more over-refusal than without it the "
        "choice may cost.",
    )
    max_new_tokens: int = Field(
        64, ge=1, description="Direction: length of an answer to a validation prompt."
    )

    @field_validator("strengths")
    @classmethod
    def _check_strengths(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        if min(strengths) <= 0:
            raise ValueError(f"strengths must be above 0, not {min(strengths)}")
        return strengths

    @property
    def searches(self) -> bool:
        """Whether layer or strength are chosen on validation prompts."""
        return self.method == "refusal-direction" and None in (self.layer, self.strength)


Choosing = TypeVar("Choosing", bound=SearchSettings | DefenceSettings)


def with_validation(
    settings: Choosing, model: str | Path, calibration: CalibrationSettings, *, needed: bool = True
) -> Choosing:
    """The settings, with the bundled validation prompts where none are named and these will do.

    They will for the bundled model, for data that are bundled too, and where they are not `needed`.
    """
    if settings.validation is not None:
        return settings
    if needed and calibration.data.name != "demo" and not is_demo(model):
        return settings
    bundled = {"validation": DataSource(name="demo", split="validation")}
    return cast(Choosing, settings.model_copy(update=bundled))


def validation_of(settings: SearchSettings | DefenceSettings) -> DataSource:
    """The prompts to choose on.

    Raises:
        RegraftError: none are named.
    """
    if settings.validation is None:
        raise RegraftError(
            "No validation prompts are named to choose on, and the bundled ones say nothing about "
            "another model and other data. Give harmful and harmless ones with --validation (in a "
            "recipe `validation`)."
        )
    return settings.validation


class EvalSettings(Settings):
    """Greedy answers, judged by the words and phrases of a refusal."""

    max_new_tokens: int = Field(
        64,
        ge=1,
        description="Length of an answer. 64 is enough for judges of how an answer begins; give "
        "256 or more where one shall read what it says (VLGuard's list, guards).",
    )
    judge: str = Field(
        DEFAULT_JUDGE.name,
        description=f"What tells refusals by their words: {', '.join(KEYWORD_JUDGES)}.",
    )
    keywords: tuple[str, ...] = Field(
        (),
        description="Instead of a judge by name: an answer refuses if one of these stands in its "
        "first characters, as whole words.",
    )
    window: int | None = Field(
        None,
        ge=1,
        description=f"How many first characters count for your own keywords ({DEFAULT_WINDOW}).",
    )
    limit: int | None = Field(None, ge=1, description="Use only the first examples of the suite.")
    backend: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="What answers: the model in memory, or vLLM (an extra) on the checkpoint, in "
        "full and faster. Their answers are not the same to the last token.",
    )
    tensor_parallel: int = Field(1, ge=1, description="vllm: accelerators that share the model.")
    max_length: int | None = Field(
        None,
        ge=1,
        description="vllm: tokens of a prompt with its image and answer; all that the model was "
        "made for if not given, which may want more memory than there is.",
    )
    perplexity: bool = Field(
        False, description="Measure the perplexity of the references of harmless prompts too."
    )
    full_answers: bool = Field(
        True,
        description="Let every answer go on to its own end or to `max_new_tokens`. If not, one "
        "that is judged and not compared with a reference ends where the verdict is certain, which "
        "saves most of its tokens.",
    )

    @model_validator(mode="after")
    def _check_judge(self) -> EvalSettings:
        if self.judge not in KEYWORD_JUDGES:
            raise ValueError(f"no judge {self.judge!r}; expected {', '.join(KEYWORD_JUDGES)}")
        if self.backend == "vllm" and self.perplexity:
            raise ValueError("perplexity is measured by the transformers backend only")
        if self.backend == "vllm" and not self.full_answers:
            raise ValueError("vllm always gives full answers: leave full_answers as it is")
        if self.backend != "vllm" and (self.tensor_parallel, self.max_length) != (1, None):
            raise ValueError("tensor_parallel and max_length are vllm's: add backend vllm")
        if self.window is not None and not self.keywords:
            raise ValueError("a window is for keywords of your own: add keywords")
        if self.keywords and not all(map(str.strip, self.keywords)):
            raise ValueError("keywords: a blank one stands in every answer")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is vLLM's is left out without it, so that evaluations of before are known again."""
        content: dict[str, Any] = whole(self)
        left_out = () if self.backend == "vllm" else ("backend", "tensor_parallel", "max_length")
        return {name: value for name, value in content.items() if name not in left_out}

    def unread(self) -> str | None:
        """What was set and changes nothing, in words."""
        if self.keywords and self.judge != _default(self, "judge"):
            return f"`keywords` take the place of the judge {self.judge}"
        return None

    def in_memory(self) -> EvalSettings:
        """The same by the model in memory."""
        own = {"backend": "transformers", "tensor_parallel": 1, "max_length": None}
        return self.model_copy(update=own)

    def keyword_judge(self) -> KeywordJudge:
        """The judge that these settings ask for."""
        if not self.keywords:
            return keyword_judge(self.judge)
        return KeywordJudge(keywords=self.keywords, window=self.window or DEFAULT_WINDOW)


def _names_of(settings: type[BaseModel]) -> set[str]:
    """Of all settings that there are."""
    return set(settings.model_fields).union(*(_names_of(one) for one in settings.__subclasses__()))


def _is_percent(problem: Mapping[str, Any]) -> bool:
    """Whether a share of at most 1 was given in per cent."""
    given = problem["input"]
    return problem["ctx"]["lt"] == 1 and isinstance(given, int | float) and 1 < given < 100


def explain(error: ValidationError, *, flags: bool = False) -> str:
    """A pydantic error in one line a field, named as in a recipe or as a command line's flag."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if flags and where:
            where = f"--{where.replace('_', '-')}"
        message = problem["msg"].removeprefix("Value error, ")
        given = f" (got {problem['input']!r})"
        if problem["type"] in ("missing", "value_error"):
            given = ""
        elif problem["type"] == "extra_forbidden":
            near = get_close_matches(str(problem["loc"][-1]), sorted(_names_of(Settings)), 1)
            message = "there is no such setting" + (f"; is it {near[0]}?" if near else "")
            given = ""
        elif problem["type"] == "tuple_type":
            message = "a list is needed, as in [0, 1]"
        elif problem["type"] in ("model_type", "dict_type"):
            message = "settings are needed, each a name and a value"
        elif problem["type"] == "less_than" and _is_percent(problem):
            message += f"; {problem['input']:g} % is {problem['input'] / 100:g}"
        lines.append(f"  {where}: {message}{given}" if where else f"  {message}{given}")
    return "\n".join(lines)
