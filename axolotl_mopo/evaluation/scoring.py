"""`axolotl mopo score`: add a column of rewards for every objective, with the reward sources of MODPO's margins."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from axolotl_mopo.config import SOURCES, Margin, RewardSource, Settings, parse_settings
from axolotl_mopo.config.sources import TRAINING_KEYS, nested_margin
from axolotl_mopo.data.reasoning import joined
from axolotl_mopo.data.rendering import ChatRenderer
from axolotl_mopo.data.rows import RatedResponse
from axolotl_mopo.data.tokenizing import tokenize
from axolotl_mopo.digests import digest
from axolotl_mopo.errors import ConfigError, DataError, RowError
from axolotl_mopo.evaluation.comparison import Comparison
from axolotl_mopo.evaluation.models import CompletionLogps, Models
from axolotl_mopo.evaluation.names import check_name, check_objectives
from axolotl_mopo.evaluation.policies import Policy, find_policies, require_weights
from axolotl_mopo.evaluation.schema import Objective, Response, inputs_of, is_unanswered, response_key
from axolotl_mopo.rewards import Rewards, TextSource
from axolotl_mopo.rewards.resolve import resolve_source

Requests = dict[tuple[int, int], tuple[list[int], list[int]]]
"""By prompt and sample: the token ids of the prompt and of the response."""


class _Scorers(Settings):
    margins: dict[str, Margin]

    @classmethod
    def nested(cls, keys: list[Any], raw: Mapping[str, Any]) -> tuple[str, type[BaseModel], list[Any]] | None:
        """See `Settings.nested`."""
        return nested_margin(keys, raw)


def parse_scorer(text: str) -> tuple[str, RewardSource]:
    """Parse `NAME=SOURCE`, `NAME=SOURCE:ARGUMENT` or `NAME={source: SOURCE, ...}` into a name and a reward source.

    Raises:
        ConfigError: if the text, the name or the source is wrong.
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
            raise ConfigError(
                f"--scorer {name}: {spec} is not a YAML mapping; write {{source: SOURCE, ...}}: {error}"
            ) from None
    else:
        source, colon, argument = spec.partition(":")
        key = (SOURCES[source].argument if source in SOURCES else None) or "argument"
        raw = {"source": source, **({key: argument} if colon else {})}
    if isinstance(raw, Mapping) and (given := TRAINING_KEYS & set(raw)):
        raise ConfigError(
            f"--scorer {name}: {', '.join(sorted(given))} apply to training only, and scores are raw rewards; remove "
            "them"
        )
    kind = SOURCES.get(str(raw.get("source"))) if isinstance(raw, Mapping) else None
    if kind and kind.needs_scores:
        raise ConfigError(f"--scorer {name}: generated responses have no column of scores; use another source")
    try:
        scorer = parse_settings(_Scorers, {"margins": {name: raw}}, "--scorer").margins[name]
        return name, resolve_source(scorer, f"`--scorer.margins.{name}")
    except ConfigError as error:
        raise ConfigError(str(error).replace("--scorer.margins.", "--scorer ")) from None


@dataclass
class Scoring:
    """Scores the responses of a comparison.

    Args:
        comparison: the responses.
        models: loads the models that compute implicit rewards.
        batch_size: number of responses in a batch, for implicit rewards.
        log: prints a line for the user.
        with_reasoning: whether scorers that read texts read the reasoning and the answer of a response.
        empty_answers: whether a response that ended inside its reasoning is scored as an empty answer.
    """

    comparison: Comparison
    models: Models
    batch_size: int
    log: Callable[[str], None]
    with_reasoning: bool = False
    empty_answers: bool = False

    def run(self, scorers: Mapping[str, Any], lower_is_better: Mapping[str, bool], replace: bool) -> None:
        """Compute the missing columns.

        Args:
            scorers: reward source of each objective.
            lower_is_better: directions that the user chose. Other objectives keep theirs; higher is better by default.
            replace: whether to replace scores of another scorer, and directions.

        Raises:
            ConfigError: if responses or answers are missing, or an objective has another scorer or direction. Nothing
                is scored in this case.
            DataError: if a response cannot be scored; names policy and prompt. Finished scores are kept.
        """
        for policy in self.comparison.policies:
            self.comparison.complete(policy.name)
        try:
            check_objectives({**self.comparison.objectives, **scorers})
        except ValueError as error:
            raise ConfigError(f"--scorer: {error}") from None
        if self.with_reasoning and not any(map(_reads_text, scorers.values())):
            raise ConfigError(
                "--with-reasoning has no effect on these scorers, which score the generated tokens; remove it"
            )
        agreed = {
            name: self._agreed(name, source, lower_is_better.get(name), replace) for name, source in scorers.items()
        }
        for name, source in scorers.items():
            if _reads_text(source) and not (self.with_reasoning or self.empty_answers):
                self._require_answers(name, self._unscored(name, agreed[name]))
        for name, source in scorers.items():
            self._score(name, source, agreed[name])

    def _score(self, name: str, source: RewardSource, objective: Objective) -> None:
        """Compute the missing part of a column. An older column is replaced only when the new one is complete."""
        if unscored := self._unscored(name, objective):
            _check_models(name, source)
            found: list[tuple[Policy, list[float], list[str]]] = []
            with ExitStack() as stack:
                rewards = _OpenRewards(stack, name, self)
                for policy in unscored:
                    responses = _PolicyResponses(self, policy, name, objective.digest, rewards)
                    found.append((policy, source.rewards(responses).tolist(), responses.computed))
            if not self._is_current(name, objective):
                # If the process is killed while columns are replaced, no objective refers to a mix of old and new.
                self.comparison.drop_objective(name)
                self.comparison.save_settings()
            for policy, values, computed in found:
                self.comparison.add_column(policy.name, name, values, computed)
        else:
            self.log(f"{name}: all responses are scored already.")
        self.comparison.add_objective(name, objective)
        self.comparison.save_settings()

    def _agreed(self, name: str, source: RewardSource, lower: bool | None, replace: bool) -> Objective:
        """The record of an objective, checked against the one that exists."""
        with_reasoning = self.with_reasoning and _reads_text(source)
        read = ["reasoning and answer"] if with_reasoning else []
        made_by = digest([source.model_dump(mode="json"), source.content_digest(), *read])
        known = self.comparison.objectives.get(name)
        if known and known.digest != made_by and not replace:
            other = "or by another version of it"
            if known.with_reasoning != with_reasoning:
                other = f"{'with' if known.with_reasoning else 'without'} --with-reasoning"
            raise ConfigError(
                f"--scorer {name}: its scores were computed by {known.scorer}, {other}; use another name, or replace "
                "the scores with --replace"
            )
        if known and lower not in (None, known.lower_is_better) and not replace:
            direction = "lower" if known.lower_is_better else "higher"
            raise ConfigError(
                f"{name} was scored with {direction} is better; remove the direction, use --{direction}-is-better "
                f"{name}, or change it with --replace"
            )
        if lower is None:
            lower = known is not None and known.lower_is_better
        if lower and source.negated:
            raise ConfigError(
                f"--lower-is-better {name}: its scorer returns minus {source.negated}, so its higher scores already "
                f"mean less of that; remove the option, or reverse the direction with --higher-is-better {name}"
            )
        scorer = source.model_dump(mode="json", exclude_defaults=True)
        return Objective(scorer=scorer, digest=made_by, lower_is_better=lower, with_reasoning=with_reasoning)

    def _is_current(self, name: str, objective: Objective) -> bool:
        known = self.comparison.objectives.get(name)
        return known is not None and known.digest == objective.digest

    def _unscored(self, name: str, objective: Objective) -> list[Policy]:
        """The policies that lack scores of an objective."""
        current = self._is_current(name, objective)
        return [policy for policy in self.comparison.policies if not current or not self._has(policy, name)]

    def _require_answers(self, name: str, policies: Sequence[Policy]) -> None:
        """Refuse responses that ended inside their reasoning, which a scorer that reads answers cannot judge.

        Raises:
            ConfigError: names the first one.
        """
        missing = [(policy, row) for policy in policies for row in self._rows(policy) if is_unanswered(row)]
        if missing:
            policy, row = missing[0]
            more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
            raise ConfigError(
                f"--scorer {name}: the response of {policy.name} to prompt {row['prompt_id']}, sample {row['sample']}"
                f"{more} ended inside its reasoning and has no answer; generate again with a larger --max-new-tokens, "
                "or score such responses as empty answers with --empty-answers, or score reasoning and answer with "
                "--with-reasoning"
            )

    def _has(self, policy: Policy, name: str) -> bool:
        return all(name in row for row in self._rows(policy))

    def _rows(self, policy: Policy) -> list[Response]:
        return self.comparison.responses(policy.name)


def _reads_text(source: RewardSource) -> bool:
    """Whether a source reads the text of a response, not its tokens."""
    return source.in_rows or source.needs_texts


def _check_models(name: str, source: RewardSource) -> None:
    """Refuse an implicit reward of which a model has no weights, before any model is loaded.

    Raises:
        ConfigError: names the model.
    """
    for key, kind in source.model_paths.items():
        path = getattr(source, key)
        if kind == "adapter":
            (model,) = find_policies([path])
            require_weights(model.whole, f"--scorer {name}")
        elif kind == "base":
            require_weights(path, f"--scorer {name}")


@dataclass
class _OpenRewards:
    """Opens the rewards of a text source on first use, and shares them between all policies."""

    stack: ExitStack
    name: str
    """Name of the objective."""
    scoring: Scoring
    opened: dict[str, Rewards] = field(default_factory=dict)

    def of(self, source: TextSource) -> Rewards:
        """The opened rewards of a source."""
        key = source.model_dump_json()
        if key not in self.opened:
            if source.code:
                self.scoring.log(f"{self.name} runs the code of {source.code}.")
            self.opened[key] = self.stack.enter_context(source.opened(self.scoring.models.device))
        return self.opened[key]


@dataclass
class _PolicyResponses:
    """The responses of a policy, as the source of one objective reads them; see `Responses`. All numbers are [N]."""

    scoring: Scoring
    policy: Policy
    name: str
    """Name of the objective."""
    made_by: str
    """A digest of the source."""
    open_rewards: _OpenRewards
    computed: list[str] = field(default_factory=list)
    """The `source` of each `Comparison.compute` call, to remove its partial results later."""
    requests: dict[str, tuple[Policy, Requests]] = field(default_factory=dict)

    @cached_property
    def rows(self) -> list[Response]:
        """The responses."""
        return self.scoring.comparison.responses(self.policy.name)

    def row_rewards(self, source: RewardSource) -> Tensor:
        """Rewards from the rows, computed at once without partial results."""
        rewards = [source.row_reward(self.name, *self._read(row)) for row in self.rows]
        return torch.tensor(rewards, dtype=torch.float64)

    def _read(self, row: Response) -> tuple[RatedResponse, int]:
        """What a source reads of a response: its text, and the number of its tokens."""
        if self.scoring.with_reasoning:
            return RatedResponse(joined(row.get("reasoning"), row["response"]), {}), len(row["token_ids"])
        return RatedResponse(row["response"], {}), len(row["token_ids"]) - row.get("reasoning_tokens", 0)

    def text_rewards(self, source: TextSource) -> Tensor:
        """Rewards from the texts, computed in batches, the longest responses first."""
        rewards = self.open_rewards.of(source)

        def one_batch(rows: list[Response]) -> list[float]:
            texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
            reasoning = [row.get("reasoning") for row in rows] if self.scoring.with_reasoning else None
            try:
                return rewards(*texts, [row["prompt_id"] for row in rows], reasoning)
            except DataError as error:
                raise DataError(f"{self.policy.name}, {self.name}: {error}; scores computed before are kept") from None

        made_by = f"{self.made_by}-{len(self.computed)}" if self.computed else self.made_by
        return self._compute(made_by, source.batch_size, one_batch, f"{self.policy.name}, {self.name}")

    def logps(self, path: str) -> Tensor:
        """Log-probs under an adapter or a whole model."""
        model, asked = self._requests(path)
        return self._logps(model.path, model.base, asked)

    def reference_logps(self, path: str, reference: str | None) -> Tensor:
        """Log-probs under `reference`, or else under the base model of the adapter at `path`."""
        model, asked = self._requests(path)
        return self._logps(reference or model.whole, None, asked)

    def _requests(self, path: str) -> tuple[Policy, Requests]:
        """The model at `path`, and every response as its token ids."""
        if path not in self.requests:
            (model,) = find_policies([path])
            override = self.scoring.comparison.settings.chat_template_kwargs
            asked = _asked(self.rows, self.policy, model, override)
            self.requests[path] = model, dict(zip(map(response_key, self.rows), asked, strict=True))
        return self.requests[path]

    def _logps(self, path: str, base: str | None, asked: Requests) -> Tensor:
        made_by = f"{self.made_by}-{len(self.computed)}"
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


def _asked(
    rows: list[Response], policy: Policy, model: Policy, override: dict[str, Any] | None = None
) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of every response as token ids of the model that scores them.

    If the model has the policy's vocabulary, completions are the sampled tokens. Otherwise their text is tokenized,
    with an end of turn if the response is finished.

    The variables of the chat template are those that the model was trained with. If that is not known and it has the
    policy's chat template, they are those that the policy was asked with.

    Args:
        rows: the responses.
        policy: the policy that generated them.
        model: the model that scores them.
        override: variables of the chat template that all policies were asked with, if any.

    Raises:
        DataError: if a token is not in the vocabulary, or a prompt or a response cannot be rendered.
    """
    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer)
    own = _local_tokenizer(policy.tokenizer, model.tokenizer, tokenizer)
    kwargs = model.chat_template_kwargs
    if model.manifest is None and own and own.chat_template == tokenizer.chat_template:
        kwargs = policy.chat_template_kwargs if override is None else override
    renderer = ChatRenderer(tokenizer, kwargs)
    try:
        prompts = tokenize(tokenizer, [renderer.prompt(row["prompt"], inputs_of(row)) for row in rows])
    except RowError as error:
        raise DataError(f"{policy.name}: {model.tokenizer}: {error}") from None
    if own and own.get_vocab() == tokenizer.get_vocab():
        largest = max(rows, key=lambda row: max(row["token_ids"]))
        if (token := max(largest["token_ids"])) >= len(tokenizer):
            raise DataError(
                f"{policy.name}, prompt {largest['prompt_id']}, sample {largest['sample']}: {model.tokenizer} has no "
                f"token {token}; generate the policy's responses again"
            )
        return list(zip(prompts, (row["token_ids"] for row in rows), strict=True))
    return list(zip(prompts, tokenize(tokenizer, [_completion(renderer, row, policy) for row in rows]), strict=True))


def _completion(renderer: ChatRenderer, row: Response, policy: Policy) -> str:
    """The text of a response as another model's chat template writes it, with its reasoning.

    Raises:
        DataError: if the template changes it or leaves out its reasoning; names the response.
    """
    reasoning, answer = row.get("reasoning"), row["response"]
    if not (reasoning or row["finished"]):
        return answer
    try:
        # The renderer parts the text again if the template prints reasoning.
        rendered = renderer.response(row["prompt"], RatedResponse(joined(reasoning, answer), {}), inputs_of(row))
    except RowError as error:
        raise DataError(f"{policy.name}, prompt {row['prompt_id']}, sample {row['sample']}: {error}") from None
    text = rendered.whole[rendered.start :]
    last = (answer if answer.strip() else reasoning or "").strip()
    return text if row["finished"] else text[: text.rindex(last) + len(last)]


def _local_tokenizer(policy: str, model: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """A policy's tokenizer. None for one on the hub that is not the model's, to avoid a download."""
    if policy == model:
        return tokenizer
    if not policy or not Path(policy).is_dir():
        return None
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(policy)
    except Exception:  # a comparison from somebody else may name any folder
        return None
    return found
