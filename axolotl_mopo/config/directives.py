"""AMoPO's directives: the settings of its prompts, and what each prompt says (arXiv 2506.07165, section 3)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from axolotl_mopo.config import templates
from axolotl_mopo.config.sandbox import check_unicode, render
from axolotl_mopo.config.settings import Number, Settings
from axolotl_mopo.config.templates import Template, dimension_values, integrated_values

INTEGRATED = "integrated"
"""Name of AMoPO's prompt that asks for all dimensions together."""

_LARGEST_SCORE = 1e6
_NARROWEST_RANGE = 0.01
"""Directives write scores with two decimals."""
_LONGEST_NAME = 200


class Directive(NamedTuple):
    """What stands around the question in the user's turn: before it, after it, or nothing."""

    before: str
    after: str

    def around(self, question: str) -> str:
        """The user's turn."""
        return f"{self.before}{question}{self.after}"


class Directives(Settings):
    """What AMoPO's prompts say beside the question: Jinja templates, rendered in a sandbox."""

    dimension: Template = Field(
        default=templates.DIMENSION,
        description=(
            "Text of the prompt of one dimension: a Jinja template of dimension, score, low, high and dimensions, or "
            "{file: PATH}."
        ),
    )
    integrated: Template = Field(
        default=templates.INTEGRATED,
        description=(
            "Text of the prompt for all dimensions together: a Jinja template of low, high and dimensions, or {file: "
            "PATH}."
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
        """Ask for all dimensions together, without a score.

        Raises:
            ValueError: if the template cannot be rendered.
        """
        try:
            return render(self.integrated, integrated_values(dimensions, score_range))
        except ValueError as error:
            raise ValueError(f"the directive `integrated` cannot be rendered: {error}; change the template") from None

    def for_one(self, dimension: str, score: float, dimensions: Sequence[str], score_range: tuple[float, float]) -> str:
        """Ask for one dimension at a score within `score_range`, the worst and the best.

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
    """The settings of a method with one prompt for each dimension that its prepared rows depend on."""

    dimensions: list[str] = Field(
        min_length=1,
        description=(
            "Qualities that prompts ask for, each the name of a score in the data: a list of at least one score name, "
            "[helpfulness, ...]."
        ),
    )
    integrated: bool = Field(
        True,
        description=(
            "Whether there is a prompt for all dimensions together as well, called `integrated` in the log: true or "
            "false."
        ),
    )
    score_range: tuple[Number, Number] = Field(
        (1, 5),
        description=(
            "Scale that directives speak of: [lowest, highest], two different numbers. Scores of the data are mapped "
            "to it."
        ),
    )
    directives: Directives = Field(
        Directives(),
        description=(
            "What the prompts say beside the question: {dimension: TEMPLATE, integrated: TEMPLATE}. Default: the "
            "texts in the guide."
        ),
    )
    directive_position: Literal["before", "after"] = Field(
        "before",
        description=(
            "Where the directive stands: before or after the question. `after` lets all prompts share the question, "
            "so fewer tokens are computed."
        ),
    )

    @field_validator("dimensions")
    @classmethod
    def _distinct(cls, dimensions: list[str]) -> list[str]:
        if repeated := sorted({name for name in dimensions if dimensions.count(name) > 1}):
            raise ValueError(f"{', '.join(repeated)} stands there more than once; name every dimension once")
        if any(not name.strip() for name in dimensions):
            raise ValueError("a dimension has an empty name; a dimension is the name of a score in the data set")
        for name in dimensions:
            if len(name) > _LONGEST_NAME:
                raise ValueError(f"the name {name[:20]!r}... has {len(name):,} characters; give it {_LONGEST_NAME}")
            check_unicode(name)
        return dimensions

    @field_validator("score_range")
    @classmethod
    def _ascending(cls, score_range: tuple[float, float]) -> tuple[float, float]:
        if score_range[0] >= score_range[1]:
            raise ValueError(f"the lowest score {score_range[0]:g} is not below the highest {score_range[1]:g}")
        if max(map(abs, score_range)) > _LARGEST_SCORE:
            raise ValueError(
                f"{score_range[0]:g} to {score_range[1]:g} goes beyond {_LARGEST_SCORE:g}; choose a range that a "
                "prompt can name, such as [1, 5]"
            )
        low, high = map(templates.readable_number, score_range)
        if high - low < _NARROWEST_RANGE / 2:
            raise ValueError(
                f"{score_range[0]:g} and {score_range[1]:g} are the same number once they are written with two "
                "decimals, as directives do; choose a wider range, such as [1, 5]"
            )
        return score_range

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if self.integrated and INTEGRATED in self.dimensions:
            raise ValueError(
                f"a dimension is named {INTEGRATED!r}, as the prompt that asks for all of them is; rename the "
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
                    f"`directives.{key}` does not go with these dimensions and this range: {error}"
                ) from None
        return self

    @property
    def prompt_names(self) -> list[str]:
        """The D prompts of every pair, in order."""
        return [INTEGRATED, *self.dimensions] if self.integrated else list(self.dimensions)

    scores_key: ClassVar[str] = "dimensions"
    """The key that names the scores."""
    margins: ClassVar[None] = None
    """There are none, so prepared rows have no columns for them."""
    texts: ClassVar[bool] = False
    """Prepared rows need not keep the texts."""

    @property
    def score_names(self) -> list[str]:
        """The scores that a pair's chosen response must have."""
        return list(self.dimensions)

    @property
    def rejected_score_names(self) -> list[str]:
        """The scores that a pair's rejected response must have."""
        return []

    @classmethod
    def nested(cls, keys: list[Any], raw: Mapping[str, Any]) -> tuple[str, type[BaseModel], list[Any]] | None:
        """See `Settings.nested`."""
        return ("directives", Directives, keys[1:]) if keys[:1] == ["directives"] and len(keys) > 1 else None

    def training_directives(self, scores: Mapping[str, float]) -> list[Directive]:
        """The directives of the D prompts of a pair.

        Args:
            scores: the chosen response's score of every dimension, within `score_range`.

        Raises:
            ValueError: if a template cannot be rendered with these scores.
        """
        common = (self.dimensions, self.score_range)
        first = [self.directives.for_all(*common)] if self.integrated else []
        others = [self.directives.for_one(name, scores[name], *common) for name in self.dimensions]
        return [self._placed(text) for text in first + others]

    def inference_directive(self, dimension: str | None = None, score: float | None = None) -> Directive:
        """The directive to ask a trained model with.

        Args:
            dimension: the only one to ask for; all of them together where None.
            score: of this dimension; the best where None.

        Raises:
            ValueError: if the model was not trained with such a prompt, or a template cannot be rendered.
        """
        common = (self.dimensions, self.score_range)
        if dimension is None:
            if score is not None:
                raise ValueError("a score needs a dimension; the integrated prompt has none")
            if not self.integrated:
                raise ValueError(
                    f"`integrated` is false, so there is no integrated prompt; choose one dimension of "
                    f"{', '.join(self.dimensions)}"
                )
            return self._placed(self.directives.for_all(*common))
        if dimension not in self.dimensions:
            raise ValueError(f"unknown dimension {dimension}; known are {', '.join(self.dimensions)}")
        low, high = self.score_range
        score = high if score is None else score
        if not low <= score <= high:
            raise ValueError(f"the score {score:g} is outside `score_range`, {low:g} to {high:g}")
        return self._placed(self.directives.for_one(dimension, score, *common))

    def _placed(self, text: str) -> Directive:
        return Directive(f"{text}\n\n", "") if self.directive_position == "before" else Directive("", f"\n\n{text}")


def user_template(directive: Directive) -> str:
    """What the user's turn says, with `{question}` where the question stands."""
    return directive.around("{question}")


def with_directive_in_template(chat_template: str, directive: Directive) -> str:
    """A chat template that puts the directive into the last user turn by itself, as `with_directive` does."""
    before, after = (json.dumps(text, ensure_ascii=False) for text in directive)
    return (
        "{% set mopo = namespace(last=-1) %}"
        "{% for message in messages %}{% if message['role'] == 'user' %}{% set mopo.last = loop.index0 %}{% endif %}"
        "{% endfor %}{% if mopo.last >= 0 %}{% set messages = messages[:mopo.last] + [{'role': 'user', 'content': "
        f"{before} ~ messages[mopo.last]['content'] ~ {after}"
        "}] + messages[mopo.last + 1:] %}{% endif %}{{ '' }}"
        f"{chat_template}"
    )
