"""`axolotl mopo score`: a column of rewards for every objective, by the same sources that MODPO takes margins from."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from axolotl_mopo.config import SOURCES, Margin, RewardSource, Settings, parse_settings
from axolotl_mopo.config.sources import TRAINING_KEYS
from axolotl_mopo.data.rows import RatedResponse
from axolotl_mopo.data.tokenizing import ChatRenderer, tokenize
from axolotl_mopo.digests import digest
from axolotl_mopo.errors import ConfigError, DataError
from axolotl_mopo.evaluation.comparison import Comparison
from axolotl_mopo.evaluation.models import CompletionLogps, Models
from axolotl_mopo.evaluation.names import check_name, check_objectives
from axolotl_mopo.evaluation.policies import Policy, find_policies, require_weights
from axolotl_mopo.evaluation.schema import Objective, Response, response_key
from axolotl_mopo.rewards import Rewards, TextSource
from axolotl_mopo.rewards.resolve import resolve_source


class _Scorers(Settings):
    margins: dict[str, Margin]


def parse_scorer(text: str) -> tuple[str, RewardSource]:
    """A name and a reward source, from `NAME=SOURCE`, `NAME=SOURCE:ARGUMENT` or `NAME={source: SOURCE, ...}`.

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
        key = (SOURCES[source].argument if source in SOURCES else None) or "argument"
        raw = {"source": source, **({key: argument} if colon else {})}
    if isinstance(raw, Mapping) and (given := TRAINING_KEYS & set(raw)):
        raise ConfigError(f"--scorer {name}: {', '.join(sorted(given))} belong to training; a scorer gives raw rewards")
    try:
        scorer = parse_settings(_Scorers, {"margins": {name: raw}}, "--scorer").margins[name]
        if scorer.needs_scores:
            raise ConfigError(
                f"--scorer {name}: responses that were just made have no column of scores; use another source"
            )
        return name, resolve_source(scorer, f"`--scorer.margins.{name}")
    except ConfigError as error:
        raise ConfigError(str(error).replace("--scorer.margins.", "--scorer ")) from None


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
            name: self._agreed(name, source, lower_is_better.get(name), replace) for name, source in scorers.items()
        }
        for name, source in scorers.items():
            self._score(name, source, agreed[name])

    def _score(self, name: str, source: RewardSource, objective: Objective) -> None:
        """Compute what is missing of a column; only when all of it is there, an older one is replaced."""
        known = self.comparison.objectives.get(name)
        current = known is not None and known.digest == objective.digest
        unscored = [policy for policy in self.comparison.policies if not current or not self._has(policy, name)]
        if unscored:
            with ExitStack() as stack:
                rewards = _OpenRewards(stack, name, self)
                responses = [_PolicyResponses(self, policy, name, objective.digest, rewards) for policy in unscored]
                found = [source.rewards(each).tolist() for each in responses]
            if not current:
                self.comparison.drop_objective(name)  # a process that is killed now leaves columns of no objective
                self.comparison.save_settings()
            for each, values in zip(responses, found, strict=True):
                self.comparison.add_column(each.policy.name, name, values, each.computed)
        else:
            self.say(f"{name}: all responses are scored.")
        self.comparison.add_objective(name, objective)
        self.comparison.save_settings()

    def _agreed(self, name: str, source: RewardSource, lower: bool | None, replace: bool) -> Objective:
        """What is to be known of an objective."""
        made_by = digest([source.model_dump(mode="json"), source.content_digest()])
        known = self.comparison.objectives.get(name)
        if known and known.digest != made_by and not replace:
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
        if lower and source.negated:
            raise ConfigError(
                f"--lower-is-better {name}: its scorer gives minus {source.negated}, so more of it is less of that "
                f"already; leave the option out, or turn the objective around with --higher-is-better {name}"
            )
        scorer = source.model_dump(mode="json", exclude_defaults=True)
        return Objective(scorer=scorer, digest=made_by, lower_is_better=lower)

    def _has(self, policy: Policy, name: str) -> bool:
        return all(name in row for row in self._rows(policy))

    def _rows(self, policy: Policy) -> list[Response]:
        return self.comparison.responses(policy.name)


@dataclass
class _OpenRewards:
    """What computes the rewards of texts: opened when it is first needed, then shared by all policies."""

    stack: ExitStack
    name: str
    """Of the objective."""
    scoring: Scoring
    rewards: Rewards | None = None

    def of(self, source: TextSource) -> Rewards:
        """The rewards of a source."""
        if self.rewards is None:
            if source.code:
                self.scoring.say(f"{self.name} runs the code of {source.code}.")
            self.rewards = self.stack.enter_context(source.opened(self.scoring.models.device))
        return self.rewards


@dataclass
class _PolicyResponses:
    """The responses of a policy, for the source of one objective; see `Responses`. All numbers are [N]."""

    scoring: Scoring
    policy: Policy
    name: str
    """Of the objective."""
    made_by: str
    """A digest of the source."""
    open_rewards: _OpenRewards
    computed: list[str] = field(default_factory=list)
    """What unfinished numbers are kept under until all are there; see `Comparison.compute`."""

    @cached_property
    def rows(self) -> list[Response]:
        """The responses."""
        return self.scoring.comparison.responses(self.policy.name)

    def row_rewards(self, source: RewardSource) -> Tensor:
        """Computed at once; nothing is kept."""
        rewards = [
            source.row_reward(self.name, RatedResponse(row["response"], {}), len(row["token_ids"])) for row in self.rows
        ]
        return torch.tensor(rewards, dtype=torch.float64)

    def text_rewards(self, source: TextSource) -> Tensor:
        """Computed in batches, the longest responses first."""
        rewards = self.open_rewards.of(source)

        def one_batch(rows: list[Response]) -> list[float]:
            texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
            try:
                return rewards(*texts, [row["prompt_id"] for row in rows])
            except DataError as error:
                raise DataError(f"{self.policy.name}, {self.name}: {error}; what was scored before is kept") from None

        return self._compute(self.made_by, source.batch_size, one_batch, f"{self.policy.name}, {self.name}")

    def logps(self, path: str) -> Tensor:
        """Under an adapter or a whole model."""
        model = self._model(path)
        return self._logps(f"{self.made_by}-0", model.path, model.base, model)

    def reference_logps(self, path: str, reference: str | None) -> Tensor:
        """Under a whole model, or under the base model of the adapter at `path`."""
        model = self._model(path)
        whole = reference or model.whole
        require_weights(whole, f"--scorer {self.name}")
        return self._logps(f"{self.made_by}-1", whole, None, model)

    def _model(self, path: str) -> Policy:
        (model,) = find_policies([path])
        return model

    def _logps(self, made_by: str, path: str, base: str | None, model: Policy) -> Tensor:
        keys = map(response_key, self.rows)
        asked = dict(zip(keys, _asked(self.rows, self.policy, model), strict=True))
        with self.scoring.models.running(path, base) as running:
            logps = CompletionLogps(running, next(iter(asked.values())))

            def one_batch(part: list[Response]) -> list[float]:
                pairs = [asked[response_key(row)] for row in part]
                return logps([prompt for prompt, _ in pairs], [completion for _, completion in pairs])

            title = f"{self.policy.name}, {self.name}, {path}"
            return self._compute(made_by, self.scoring.batch_size, one_batch, title)

    def _compute(
        self, made_by: str, batch: int, function: Callable[[list[Response]], list[float]], title: str
    ) -> Tensor:
        self.computed.append(made_by)
        values = self.scoring.comparison.compute(self.policy.name, self.name, made_by, batch, function, title)
        return torch.tensor(values, dtype=torch.float64)


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
