"""AMoPO's directives: settings of its prompts and their texts (arXiv 2506.07165, section 3)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from axolotl_mopo.config import templates
from axolotl_mopo.config.sandbox import check_unicode, render
from axolotl_mopo.config.settings import Number, Settings
from axolotl_mopo.config.templates import Template, dimension_values, integrated_values

INTEGRATED = "integrated"
"""Name of AMoPO's prompt for all dimensions together."""

_LARGEST_SCORE = 1e6
_NARROWEST_RANGE = 0.01
"""Directives write scores with two decimals, so the two ends of a narrower range could look the same."""
_LONGEST_NAME = 200


class Directive(NamedTuple):
    """Texts before and after the question in the last user turn, or after the system message; either may be empty."""

    before: str
    after: str
    in_system: bool = False

    def around(self, content: str) -> str:
        """The content of the turn with the directive."""
        if self.in_system and not content.strip():
            return f"{self.before}{self.after}".strip("\n")
        return f"{self.before}{content}{self.after}"


class Directives(Settings):
    """Texts that AMoPO's prompts add to the question: Jinja templates, rendered in a sandbox."""

    dimension: Template = Field(
        default=templates.DIMENSION,
        description=(
            "Directive of the prompt for one dimension: a Jinja template with the variables dimension, score, low, "
            "high and dimensions, or {file: PATH}."
        ),
    )
    integrated: Template = Field(
        default=templates.INTEGRATED,
        description=(
            "Directive of the prompt for all dimensions together: a Jinja template with the variables low, high and "
            "dimensions, or {file: PATH}."
        ),
    )

    @field_validator("dimension")
    @classmethod
    def _dimension_renders(cls, template: str) -> str:
        templates.check(template, templates.DIMENSION_VARIABLES)
        return template

    @field_validator("integrated")
    @classmethod
    def _integrated_renders(cls, template: str) -> str:
        templates.check(template, templates.INTEGRATED_VARIABLES)
        return template

    def for_all(self, dimensions: Sequence[str], score_range: tuple[float, float]) -> str:
        """Text that asks for all dimensions together, without a score.

        Raises:
            ValueError: if the template cannot be rendered.
        """
        try:
            return render(self.integrated, integrated_values(dimensions, score_range))
        except ValueError as error:
            raise ValueError(f"the directive `integrated` cannot be rendered: {error}; change the template") from None

    def for_one(self, dimension: str, score: float, dimensions: Sequence[str], score_range: tuple[float, float]) -> str:
        """Text that asks for one dimension at a score within `score_range`, [lowest, highest].

        Raises:
            ValueError: if the template cannot be rendered with this score.
        """
        values = dimension_values(dimension, score, dimensions, score_range)
        try:
            return render(self.dimension, values)
        except ValueError as error:
            raise ValueError(
                f"the directive `dimension` cannot be rendered for {dimension} at the score {values['score']}: "
                f"{error}; change the template"
            ) from None


class PromptSettings(Settings):
    """Settings that prepared rows depend on, for a method with one prompt for each dimension."""

    dimensions: list[str] = Field(
        min_length=1,
        description=(
            "Qualities that the prompts ask for: a list of at least one score name of the data, [helpfulness, ...]."
        ),
    )
    integrated: bool = Field(
        True,
        description=(
            "Whether to add a prompt for all dimensions together, which the log calls `integrated`: true or false."
        ),
    )
    score_range: tuple[Number, Number] = Field(
        (1, 5),
        description=(
            "Scale of the scores in directives: [lowest, highest], two different numbers. Scores of the data are "
            "mapped to it."
        ),
    )
    directives: Directives = Field(
        Directives(),
        description=(
            "Texts that the prompts add to the question: {dimension: TEMPLATE, integrated: TEMPLATE}. Default: the "
            "built-in templates."
        ),
    )
    directive_position: Literal["before", "after", "system"] = Field(
        "before",
        description=(
            "Position of the directive: before or after the question, which is the last user turn, or in the system "
            "message, after its text. With `after`, all prompts share the question, so fewer tokens are computed."
        ),
    )

    @field_validator("dimensions")
    @classmethod
    def _distinct(cls, dimensions: list[str]) -> list[str]:
        if repeated := sorted({name for name in dimensions if dimensions.count(name) > 1}):
            raise ValueError(f"{', '.join(repeated)} is named more than once; name every dimension once")
        if any(not name.strip() for name in dimensions):
            raise ValueError("a dimension has an empty name; a dimension is the name of a score in the data set")
        for name in dimensions:
            if len(name) > _LONGEST_NAME:
                raise ValueError(f"the name {name[:20]!r}... has {len(name):,} characters; limit: {_LONGEST_NAME}")
            check_unicode(name)
        return dimensions

    @field_validator("score_range")
    @classmethod
    def _ascending(cls, score_range: tuple[float, float]) -> tuple[float, float]:
        if score_range[0] >= score_range[1]:
            raise ValueError(
                f"the lowest score {score_range[0]:g} is not below the highest {score_range[1]:g}; write [lowest, "
                "highest]"
            )
        if max(map(abs, score_range)) > _LARGEST_SCORE:
            raise ValueError(
                f"{score_range[0]:g} to {score_range[1]:g} goes beyond {_LARGEST_SCORE:g}; choose a smaller range, "
                "such as [1, 5]"
            )
        low, high = map(templates.readable_number, score_range)
        if high - low < _NARROWEST_RANGE / 2:
            raise ValueError(
                f"{score_range[0]:g} and {score_range[1]:g} are the same number with two decimals, which directives "
                "use; choose a wider range, such as [1, 5]"
            )
        return score_range

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if self.integrated and INTEGRATED in self.dimensions:
            raise ValueError(
                f"a dimension is named {INTEGRATED!r}, which is the name of the prompt for all dimensions; rename the "
                "dimension or set `integrated: false`"
            )
        return self

    @model_validator(mode="after")
    def _directives_render(self) -> Self:
        for key in ("dimension", "integrated"):
            known = templates.DIMENSION_VARIABLES if key == "dimension" else templates.INTEGRATED_VARIABLES
            trials = templates.tried_values(known, self.dimensions, self.score_range)
            try:
                templates.check(getattr(self.directives, key), known, trials)
            except ValueError as error:
                raise ValueError(
                    f"`directives.{key}` does not work with these dimensions and this range: {error}"
                ) from None
        return self

    @property
    def prompt_names(self) -> list[str]:
        """Names of the D prompts of every pair, in order."""
        return [INTEGRATED, *self.dimensions] if self.integrated else list(self.dimensions)

    scores_key: ClassVar[str] = "dimensions"
    """Key of the YAML that names the scores."""
    margins: ClassVar[None] = None
    """No margins, so prepared rows have no columns for them."""
    texts: ClassVar[bool] = False
    """Prepared rows do not keep the texts."""

    @property
    def score_names(self) -> list[str]:
        """Scores that the chosen response of a pair must have."""
        return list(self.dimensions)

    @property
    def rejected_score_names(self) -> list[str]:
        """Scores that the rejected response of a pair must have."""
        return []

    @classmethod
    def nested(cls, keys: list[Any], raw: Mapping[str, Any]) -> tuple[str, type[BaseModel], list[Any]] | None:
        """See `Settings.nested`."""
        return ("directives", Directives, keys[1:]) if keys[:1] == ["directives"] and len(keys) > 1 else None

    def training_directives(self, scores: Mapping[str, float]) -> list[Directive]:
        """The directives of the D prompts of a pair.

        Args:
            scores: the score of the chosen response on every dimension, within `score_range`.

        Raises:
            ValueError: if a template cannot be rendered with these scores.
        """
        common = (self.dimensions, self.score_range)
        first = [self.directives.for_all(*common)] if self.integrated else []
        others = [self.directives.for_one(name, scores[name], *common) for name in self.dimensions]
        return [self._placed(text) for text in first + others]

    def inference_directive(self, dimension: str | None = None, score: float | None = None) -> Directive:
        """The directive for a trained model.

        Args:
            dimension: the only dimension to ask for; all dimensions together if None.
            score: the score of this dimension; the best if None.

        Raises:
            ValueError: if the model was not trained with such a prompt, or a template cannot be rendered.
        """
        common = (self.dimensions, self.score_range)
        if dimension is None:
            if score is not None:
                raise ValueError("a score needs a dimension, since the integrated prompt has none; name a dimension")
            if not self.integrated:
                raise ValueError(
                    f"`integrated` is false, so there is no integrated prompt; choose one of the dimensions "
                    f"{', '.join(self.dimensions)}"
                )
            return self._placed(self.directives.for_all(*common))
        if dimension not in self.dimensions:
            raise ValueError(f"unknown dimension {dimension}; use one of {', '.join(self.dimensions)}")
        low, high = self.score_range
        score = high if score is None else score
        if not low <= score <= high:
            raise ValueError(f"the score {score:g} is outside `score_range`; choose one from {low:g} to {high:g}")
        return self._placed(self.directives.for_one(dimension, score, *common))

    def _placed(self, text: str) -> Directive:
        if self.directive_position == "before":
            return Directive(f"{text}\n\n", "")
        return Directive("", f"\n\n{text}", in_system=self.directive_position == "system")


def turn_template(directive: Directive) -> str:
    """The turn with the directive, with `{question}` or `{system}` in the place of its content."""
    return directive.around("{system}" if directive.in_system else "{question}")


def with_directive_in_template(chat_template: str, directive: Directive) -> str:
    """A chat template that adds the directive to its turn, as `with_directive` does."""
    texts = (directive.before, directive.after, directive.around(""))
    before, after, alone = (json.dumps(text, ensure_ascii=False) for text in texts)
    if directive.in_system:
        return (
            "{% if messages and messages[0]['role'] == 'system' %}"
            "{% set mopo = messages[0]['content'] %}{% set messages = messages[1:] %}"
            "{% else %}{% set mopo = '' %}{% endif %}"
            f"{{% set mopo = mopo ~ {after} if mopo | trim else {alone} %}}"
            "{% set messages = [{'role': 'system', 'content': mopo}] + messages %}{{ '' }}"
            f"{chat_template}"
        )
    return (
        "{% set mopo = namespace(last=-1) %}"
        "{% for message in messages %}{% if message['role'] == 'user' %}{% set mopo.last = loop.index0 %}{% endif %}"
        "{% endfor %}{% if mopo.last >= 0 %}{% set messages = messages[:mopo.last] + [{'role': 'user', 'content': "
        f"{before} ~ messages[mopo.last]['content'] ~ {after}"
        "}] + messages[mopo.last + 1:] %}{% endif %}{{ '' }}"
        f"{chat_template}"
    )
