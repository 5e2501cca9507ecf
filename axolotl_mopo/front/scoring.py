"""`axolotl mopo score`: a column of rewards for every objective, by the same sources that MODPO takes margins from."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml
from transformers import AutoTokenizer

from axolotl_mopo.config import (
    AdapterMargin,
    Block,
    ConfigError,
    LengthMargin,
    Margin,
    RewardModelMargin,
    TextMargin,
    parse_block,
)
from axolotl_mopo.data.formats.rated import RESPONSE_COLUMNS
from axolotl_mopo.data.rows import DataError
from axolotl_mopo.data.tokenizing import ChatRenderer, tokenize
from axolotl_mopo.front.models import Models, SequenceScorer
from axolotl_mopo.front.policies import Policy, check_name, find_policies
from axolotl_mopo.front.store import Comparison, Response
from axolotl_mopo.margins.fingerprint import digest
from axolotl_mopo.margins.functions import function_digest, function_name
from axolotl_mopo.margins.precompute import model_digest
from axolotl_mopo.margins.rewards import Rewards, function_rewards, model_rewards
from axolotl_mopo.margins.rows import length_reward
from axolotl_mopo.margins.settling import check_margin

_MAIN_KEYS = {"length": "unit", "adapter": "path", "reward_model": "path", "callable": "function"}
_TRAINING_KEYS = {"clip", "normalize", "scale"}

Numbers = Callable[[Policy], list[float]]
"""A policy -> the rewards of its responses."""


class _Scorers(Block):
    margins: dict[str, Margin]


def parse_scorer(text: str) -> tuple[str, Any]:
    """A name and a margin source, from `NAME=SOURCE`, `NAME=SOURCE:ARGUMENT` or `NAME={source: SOURCE, ...}`.

    Raises:
        ConfigError: saying what is wrong with it.
    """
    name, equals, spec = text.partition("=")
    if not equals:
        raise ConfigError(f"--scorer {text}: write NAME=SOURCE, for instance brief=length:words")
    if check_name(name, "objective") in RESPONSE_COLUMNS:
        raise ConfigError(f"--scorer {name}: responses have a column of this name already; choose another")
    if spec.lstrip().startswith("{"):
        try:
            raw = yaml.safe_load(spec)
        except yaml.YAMLError as error:
            raise ConfigError(f"--scorer {name}: {spec} is no YAML mapping: {error}") from None
    else:
        source, colon, argument = spec.partition(":")
        raw = {"source": source, **({_MAIN_KEYS.get(source, "argument"): argument} if colon else {})}
    if isinstance(raw, Mapping) and (given := _TRAINING_KEYS & set(raw)):
        raise ConfigError(f"--scorer {name}: {', '.join(sorted(given))} belong to training; a scorer gives raw rewards")
    if isinstance(raw, Mapping) and raw.get("source") == "column":
        raise ConfigError(
            f"--scorer {name}: responses that were just made have no column of scores; use another source"
        )
    try:
        margin = parse_block(_Scorers, {"margins": {name: raw}}, "--scorer").margins[name]
        beta = check_margin(margin, f"`--scorer.margins.{name}")
    except ConfigError as error:
        raise ConfigError(str(error).replace("--scorer.margins.", "--scorer ")) from None
    return name, margin if beta is None else margin.model_copy(update={"beta": beta})


@dataclass
class Scoring:
    """Scores the responses of a comparison.

    Args:
        comparison: the responses.
        models: compute implicit rewards.
        batch_size: responses at a time, for these.
        say: tells the user what was done.
    """

    comparison: Comparison
    models: Models
    batch_size: int
    say: Callable[[str], None]

    def run(self, scorers: Mapping[str, Any], lower_is_better: Collection[str], replace: bool) -> None:
        """Add the columns that are missing.

        Args:
            scorers: objectives, and where their rewards come from.
            lower_is_better: those of which less is better.
            replace: scores objectives anew that another scorer scored.

        Raises:
            ConfigError: where an objective was scored by another scorer.
            DataError: naming policy and prompt that cannot be scored; what was computed before is kept.
        """
        with self.comparison.locked():
            for name, margin in scorers.items():
                self._agree(name, margin, name in lower_is_better, replace)
                unscored = [policy for policy in self.comparison.policies if not self._has(policy, name)]
                if not unscored:
                    self.say(f"{name}: all responses are scored.")
                    continue
                with self._numbers(name, margin) as numbers:
                    for policy in unscored:
                        self.comparison.add_column(policy.name, name, numbers(policy))

    def _agree(self, name: str, margin: Any, lower: bool, replace: bool) -> None:
        source = digest([margin.model_dump(mode="json"), _content(margin)])
        known = self.comparison.objectives.get(name, {"digest": source})
        if known["digest"] != source:
            if not replace:
                raise ConfigError(
                    f"--scorer {name}: its scores were made by {known['scorer']}, or that has changed since; give "
                    "another name, or score anew with --replace"
                )
            for policy in self.comparison.policies:
                rows = self.comparison.responses(policy.name)
                self.comparison.replace(policy.name, [{k: v for k, v in row.items() if k != name} for row in rows])
        scorer = margin.model_dump(mode="json", exclude_defaults=True)
        self.comparison.objectives[name] = {"scorer": scorer, "digest": source, "lower_is_better": lower}
        self.comparison.save_settings()

    def _has(self, policy: Policy, name: str) -> bool:
        return all(name in row for row in self.comparison.responses(policy.name))

    @contextmanager
    def _numbers(self, name: str, margin: Any) -> Iterator[Numbers]:
        source = self.comparison.objectives[name]["digest"]
        match margin:
            case LengthMargin():
                yield lambda policy: [
                    length_reward(margin.unit, row["response"], len(row["token_ids"])) for row in self._rows(policy)
                ]
            case TextMargin():
                self.say(f"{name} runs the code of {function_name(margin)}.")
                yield self._by_texts(name, source, function_rewards(margin), margin.batch_size)
            case RewardModelMargin():
                with model_rewards(margin, self.models.device) as rewards:
                    yield self._by_texts(name, source, rewards, margin.batch_size)
            case _:
                yield lambda policy: self._implicit(policy, name, source, margin)

    def _by_texts(self, name: str, source: str, rewards: Rewards, batch_size: int) -> Numbers:
        def numbers(policy: Policy) -> list[float]:
            def one_batch(rows: list[Response]) -> list[float]:
                texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
                try:
                    return rewards(*texts, [row["prompt_id"] for row in rows])
                except DataError as error:
                    raise DataError(f"{policy.name}, {name}: {error}; what was scored before is kept") from None

            title = f"{policy.name}, {name}"
            return self.comparison.compute(policy.name, name, source, batch_size, one_batch, title)

        return numbers

    def _implicit(self, policy: Policy, name: str, source: str, margin: AdapterMargin) -> list[float]:
        """beta * (logp - reference_logp) of a model that was trained on another objective's preferences."""
        (model,) = find_policies([margin.path])
        renderer = ChatRenderer(tokenizer := AutoTokenizer.from_pretrained(model.tokenizer))
        rows = self._rows(policy)
        texts = [
            part
            for row in rows
            for part in (renderer.prompt(row["prompt"]), renderer.completion(row["prompt"], row["response"]))
        ]
        ids = iter(tokenize(tokenizer, texts))
        asked = {(row["prompt_id"], row["sample"]): (next(ids), next(ids)) for row in rows}
        logps: list[list[float]] = []
        for path, base in ((model.path, model.base), (margin.reference or model.whole, None)):
            with self.models.running(path, base) as running:
                scorer = SequenceScorer(running, next(iter(asked.values())))

                def one_batch(part: list[Response], scorer: SequenceScorer = scorer) -> list[float]:
                    pairs = [asked[row["prompt_id"], row["sample"]] for row in part]
                    return scorer([prompt for prompt, _ in pairs], [completion for _, completion in pairs])

                made = f"{source}-{len(logps)}"
                title = f"{policy.name}, {name}, {path}"
                logps.append(self.comparison.compute(policy.name, name, made, self.batch_size, one_batch, title))
        assert margin.beta  # noqa: S101 (settled when it was parsed)
        return [margin.beta * (own - other) for own, other in zip(*logps, strict=True)]

    def _rows(self, policy: Policy) -> list[Response]:
        return self.comparison.responses(policy.name)


def _content(margin: Any) -> str:
    """A name made of what a scorer's numbers depend on besides its settings."""
    match margin:
        case TextMargin():
            return function_digest(margin)
        case RewardModelMargin():
            return model_digest(margin.path)
        case AdapterMargin():
            return digest([model_digest(margin.path), margin.reference and model_digest(margin.reference)])
        case _:
            return ""
