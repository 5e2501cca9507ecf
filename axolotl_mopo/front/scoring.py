"""`axolotl mopo score`: a column of rewards for every objective, by the same sources that MODPO takes margins from."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

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
from axolotl_mopo.data.rows import DataError
from axolotl_mopo.data.tokenizing import ChatRenderer, tokenize
from axolotl_mopo.front.models import Models, SequenceScorer
from axolotl_mopo.front.names import check_name, check_objectives
from axolotl_mopo.front.policies import Policy, find_policies, require_weights
from axolotl_mopo.front.records import Objective, Response, response_key
from axolotl_mopo.front.store import Comparison
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
    try:
        check_name(name)
        check_objectives([name])
    except ValueError as error:
        raise ConfigError(f"--scorer {text}: {error}") from None
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

    def run(self, scorers: Mapping[str, Any], lower_is_better: Mapping[str, bool], replace: bool) -> None:
        """Add the columns that are missing.

        Args:
            scorers: objectives, and where their rewards come from.
            lower_is_better: of objectives whose direction is said; the others' is what it was, or more is better.
            replace: scores objectives anew that another scorer scored, or whose direction was another.

        Raises:
            ConfigError: where responses are missing, or an objective was scored otherwise; nothing is scored then.
            DataError: naming policy and prompt that cannot be scored; what was computed before is kept.
        """
        for policy in self.comparison.policies:
            self.comparison.complete(policy.name)
        try:
            check_objectives({**self.comparison.objectives, **scorers})
        except ValueError as error:
            raise ConfigError(f"--scorer: {error}") from None
        agreed = {
            name: self._agreed(name, margin, lower_is_better.get(name), replace) for name, margin in scorers.items()
        }
        for name, margin in scorers.items():
            self._score(name, margin, agreed[name])

    def _score(self, name: str, margin: Any, objective: Objective) -> None:
        """Compute what is missing of a column; only when all of it is there, an older one is replaced."""
        known = self.comparison.objectives.get(name)
        current = known is not None and known.digest == objective.digest
        unscored = [policy for policy in self.comparison.policies if not current or not self._has(policy, name)]
        if unscored:
            with self._numbers(name, margin, objective.digest) as numbers:
                found = {policy.name: numbers(policy) for policy in unscored}
            if not current:
                self.comparison.drop_objective(name)  # a process that is killed now leaves columns of no objective
                self.comparison.save_settings()
            for policy, values in found.items():
                self.comparison.add_column(policy, name, values, _sources(objective.digest, margin))
        else:
            self.say(f"{name}: all responses are scored.")
        self.comparison.add_objective(name, objective)
        self.comparison.save_settings()

    def _agreed(self, name: str, margin: Any, lower: bool | None, replace: bool) -> Objective:
        """What is to be known of an objective."""
        source = digest([margin.model_dump(mode="json"), _content(margin)])
        known = self.comparison.objectives.get(name)
        if known and known.digest != source and not replace:
            raise ConfigError(
                f"--scorer {name}: its scores were made by {known.scorer}, or that has changed since; give another "
                "name, or score anew with --replace"
            )
        if known and lower not in (None, known.lower_is_better) and not replace:
            said, option = ("lower", "--lower-is-better") if known.lower_is_better else ("higher", "--higher-is-better")
            raise ConfigError(
                f"{name} was scored with {said} is better; leave the direction out or say {option} {name}, or change "
                "it with --replace"
            )
        if lower is None:
            lower = known is not None and known.lower_is_better
        if lower and isinstance(margin, LengthMargin):
            raise ConfigError(
                f"--lower-is-better {name}: its scorer gives minus the length, so more of it is a shorter response "
                f"already; leave the option out, or turn the objective around with --higher-is-better {name}"
            )
        scorer = margin.model_dump(mode="json", exclude_defaults=True)
        return Objective(scorer=scorer, digest=source, lower_is_better=lower)

    def _has(self, policy: Policy, name: str) -> bool:
        return all(name in row for row in self._rows(policy))

    @contextmanager
    def _numbers(self, name: str, margin: Any, source: str) -> Iterator[Numbers]:
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
        require_weights(margin.reference or model.whole, f"--scorer {name}")
        rows = self._rows(policy)
        asked = dict(zip(map(response_key, rows), _asked(rows, policy, model), strict=True))
        logps: list[list[float]] = []
        for path, base in ((model.path, model.base), (margin.reference or model.whole, None)):
            with self.models.running(path, base) as running:
                scorer = SequenceScorer(running, next(iter(asked.values())))

                def one_batch(part: list[Response], scorer: SequenceScorer = scorer) -> list[float]:
                    pairs = [asked[response_key(row)] for row in part]
                    return scorer([prompt for prompt, _ in pairs], [completion for _, completion in pairs])

                made = f"{source}-{len(logps)}"
                title = f"{policy.name}, {name}, {path}"
                logps.append(self.comparison.compute(policy.name, name, made, self.batch_size, one_batch, title))
        assert margin.beta  # noqa: S101 (settled when it was parsed)
        return [margin.beta * (own - other) for own, other in zip(*logps, strict=True)]

    def _rows(self, policy: Policy) -> list[Response]:
        return self.comparison.responses(policy.name)


def _sources(source: str, margin: Any) -> list[str]:
    """What numbers are kept under until all are there; see `Comparison.compute`."""
    match margin:
        case LengthMargin():
            return []
        case AdapterMargin():
            return [f"{source}-{number}" for number in range(2)]
        case _:
            return [source]


def _asked(rows: list[Response], policy: Policy, model: Policy) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of every response as token ids of the model that scores them.

    Where it has the policy's vocabulary, completions are the tokens that were drawn; else their text is tokenised, with
    the end of a turn where there was one.

    Raises:
        DataError: where a token is none of the vocabulary.
    """
    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer)
    renderer = ChatRenderer(tokenizer)
    prompts = tokenize(tokenizer, [renderer.prompt(row["prompt"]) for row in rows])
    if _same_vocabulary(policy.tokenizer, model.tokenizer, tokenizer):
        largest = max(rows, key=lambda row: max(row["token_ids"]))
        if (token := max(largest["token_ids"])) >= len(tokenizer):
            raise DataError(
                f"{policy.name}, prompt {largest['prompt_id']}, sample {largest['sample']}: there is no token {token} "
                f"in {model.tokenizer}"
            )
        return list(zip(prompts, (row["token_ids"] for row in rows), strict=True))
    texts = [
        renderer.completion(row["prompt"], row["response"]) if row["finished"] else row["response"] for row in rows
    ]
    return list(zip(prompts, tokenize(tokenizer, texts), strict=True))


def _same_vocabulary(policy: str, model: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a policy's tokenizer is known to have the tokens of a model's; one on the hub is not fetched for it."""
    if policy == model:
        return True
    if not policy or not Path(policy).is_dir():
        return False
    try:
        other = AutoTokenizer.from_pretrained(policy)
    except Exception:  # a received folder may name any folder
        return False
    return bool(other.get_vocab() == tokenizer.get_vocab())


def _content(margin: Any) -> str:
    """A name made of what a scorer's numbers depend on besides its settings."""
    match margin:
        case TextMargin():
            return function_digest(margin)
        case RewardModelMargin():
            return model_digest(margin.path)
        case AdapterMargin():
            reference = margin.reference and model_digest(margin.reference)
            return digest([model_digest(margin.path), reference, "the tokens that were drawn"])
        case _:
            return ""
