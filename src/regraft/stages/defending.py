"""Make a defence at inference: a prompt, or a refusal direction and where to add it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regraft import distributed
from regraft.data.collate import Batch, prompt_batch
from regraft.data.example import KINDS, Example, Reading
from regraft.defence import (
    Defence,
    Direction,
    ShieldPrompt,
    Trial,
    acting,
    choose,
    load_defence,
    mean_states,
    middle_layers,
    save_defence,
)
from regraft.errors import RegraftError
from regraft.evaluation.generate import answering_tokens, generate
from regraft.evaluation.judges import TextJudge
from regraft.evaluation.keywords import DEFAULT_JUDGE
from regraft.evaluation.metrics import wilson
from regraft.evaluation.summary import judge_answer
from regraft.loading import cut, load
from regraft.models.load import Source
from regraft.progress import Advance
from regraft.settings.defending import (
    AnyDefenceSettings,
    DefencePromptSettings,
    RefusalDirectionSettings,
)
from regraft.settings.searching import suites_of, with_validation
from regraft.stages.provenance import describe, fingerprints, is_done, working
from regraft.stages.reading import note_prompts
from regraft.stages.setup import Setup
from regraft.stages.steps import PromptUse, Step


def defence_step(
    setup: Setup,
    pruned: Callable[[], Source],
    out: Path,
    settings: AnyDefenceSettings,
    judge: TextJudge = DEFAULT_JUDGE,
    name: str = "",
) -> Step:
    """The step of `write_defence`; `name` is that of the defended model.

    `pruned` returns the pruned model; it is called when the step is made, not before.
    """
    if isinstance(settings, RefusalDirectionSettings) and settings.searches:
        settings = with_validation(settings, setup.dense.folder, setup.calibration)
    direction = settings if isinstance(settings, RefusalDirectionSettings) else None

    def check() -> PromptUse:
        if direction is None:
            return PromptUse()
        check_direction_layer(setup.dense, direction)
        learnt, role = setup.learnt_from(), f"{name}'s validation" if name else "validation"
        searched = {role: setup.validation(direction)} if direction.searches else {}
        return PromptUse(learnt, searched)

    def make() -> Defence:
        return write_defence(setup, pruned(), out, settings, judge)

    return Step("defend", name, out, make, check, loads_model=direction is not None)


def write_defence(
    setup: Setup,
    model: Source,
    out: Path,
    settings: AnyDefenceSettings,
    judge: TextJudge = DEFAULT_JUDGE,
) -> Defence:
    """Make a defence for a pruned model; writes the file `out`.

    A refusal direction is the difference between this model's mean states on D^s and D^u prompts,
    whose responses are not used.

    Raises:
        RegraftError: see the data readers; the layer is not one that every prompt runs through.
    """
    inputs = fingerprints(setup.progress, model=model)
    if isinstance(settings, DefencePromptSettings):
        data: dict[str, Reading] = {}
        about = describe("defend", inputs, settings)
    else:
        check_direction_layer(model, settings)
        data = {kind: setup.drawn(kind) for kind in KINDS}
        if settings.searches:
            data["validation"] = setup.validation(settings)
        about = describe("defend", inputs, settings, setup.compute, data)
        about["judge"] = judge.name
    if not is_done(out, about, lambda: load_defence(out).about):
        note_prompts(setup.progress.note, data)
        with working(out, about) as work:
            made: Defence
            if isinstance(settings, DefencePromptSettings):
                made = ShieldPrompt(settings.prompt, about, settings.before)
            else:
                if settings.searches:
                    setup.target(setup.dense).warn(suites_of(settings))
                made = _direction(setup, model, settings, data, judge, work, about)
                if not made.strength:
                    setup.progress.note(
                        f"{out.name}: no layer and strength lowers ASR within the limit on "
                        "over-refusal; nothing is added."
                    )
            if distributed.first():
                save_defence(out, made)
    return load_defence(out)


def _direction(
    setup: Setup,
    model: Source,
    settings: RefusalDirectionSettings,
    data: Mapping[str, Reading],
    judge: TextJudge,
    work: Path,
    about: Mapping[str, Any],
) -> Direction:
    setup.cache.unload()
    network, processor = load(model, setup.compute, setup.progress, setup.dense)
    cuts = [cut(data[kind].examples, setup.compute) for kind in KINDS]
    vectors = _differences(
        setup,
        model,
        network,  # the batches have no name here: their images are freed before the search
        [[prompt_batch(processor, chunk) for chunk in chunks] for chunks in cuts],
    )
    search = _Search(network, processor, vectors, settings, setup, judge, work, about)
    return search.run(data.get("validation"))


def _differences(
    setup: Setup, model: Source, network: nn.Module, encoded: Sequence[Sequence[Batch]]
) -> Tensor:
    """Difference of mean states by layer, `[layers, d]` float32; NaN if one skipped a prompt."""
    layers, width = len(model.architecture.layers), model.architecture.hidden_size
    own = sum(len(batch.ids) for batches in encoded for batch in distributed.share(batches))
    with setup.progress.task("Taking means of hidden states", own, "prompts") as done:
        harmful, harmless = (
            mean_states(network, batches, layers, width, done) for batches in encoded
        )
    return (harmful - harmless).float()


@dataclass(frozen=True)
class _Search:
    """Tries layers and strengths on validation prompts; every finished batch is kept in `work`."""

    model: nn.Module
    processor: Any
    vectors: Tensor  # [layers, d]
    settings: RefusalDirectionSettings
    setup: Setup
    judge: TextJudge
    work: Path
    about: Mapping[str, Any]

    def run(self, validation: Reading | None) -> Direction:
        """The direction at the given layer and strength, or at the best ones."""
        layers, given = self._layers(), self.settings.strength
        strengths = sorted(set(self.settings.strengths)) if given is None else [given]
        if validation is None:
            return self._direction(layers[0], strengths[0])
        grid = [(layer, strength) for layer in layers for strength in strengths]
        tokens = (1 + len(grid)) * answering_tokens(
            validation.examples, self.settings.max_new_tokens
        )
        what = "Choosing layer and strength", tokens, "tokens (estimate)"
        with self.setup.progress.task(*what) as done:
            plain, *trials = (
                self._try(layer, strength, validation.examples, done)
                for layer, strength in [(layers[0], 0.0), *grid]
            )
        best = choose(trials, plain, self.settings.max_over_refusal)
        return self._direction(best.layer, best.strength, (plain, *trials))

    def _layers(self) -> list[int]:
        runs = ~self.vectors.isnan().any(dim=1)
        given = self.settings.layer
        wanted = middle_layers(len(self.vectors)) if given is None else [given]
        found = [layer for layer in wanted if runs[layer]]
        if not found:
            raise RegraftError(
                f"None of the layers {list(wanted)} runs on every calibration prompt: this model "
                "skips its cross-attention where there is no image. Give another --layer."
            )
        return found

    def _direction(self, layer: int, strength: float, trials: tuple[Trial, ...] = ()) -> Direction:
        return Direction(self.vectors[layer].clone(), layer, strength, self.about, trials)

    def _try(
        self, layer: int, strength: float, examples: Sequence[Example], advance: Advance
    ) -> Trial:
        with acting(self._direction(layer, strength), self.model):
            answers = generate(
                self.model,
                self.processor,
                examples,
                self.work / f"layer_{layer:03d}_strength_{strength!r}",
                max_new_tokens=self.settings.max_new_tokens,
                batch_size=self.setup.compute.batch_size,
                advance=advance,
            )
        judged = [
            judge_answer(example, answer, self.judge, max_new_tokens=self.settings.max_new_tokens)
            for example, answer in zip(examples, answers, strict=True)
        ]
        attacks = [one.complies for one in judged if one.harmful]
        harmless = [one.refused for one in judged if not one.harmful]
        return Trial(
            layer,
            strength,
            wilson(sum(attacks), len(attacks)),
            wilson(sum(harmless), len(harmless)),
            sum(one.counts_as_degenerate for one in judged) / len(judged),
        )


def check_direction_layer(source: Source, settings: RefusalDirectionSettings) -> None:
    """Raise unless the model has the layer at which a refusal direction is to be added."""
    count = len(source.architecture.layers)
    if settings.layer is not None and settings.layer >= count:
        raise RegraftError(f"layer is {settings.layer}; the model has layers 0 to {count - 1}.")
