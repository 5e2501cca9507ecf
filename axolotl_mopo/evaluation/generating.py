"""`axolotl mopo generate`: generate each policy's responses, and their log-probs under it and under the reference."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from accelerate.utils import tqdm
from transformers import AutoConfig, AutoTokenizer

from axolotl_mopo.data.reasoning import ReasoningParser
from axolotl_mopo.data.rendering import ChatRenderer
from axolotl_mopo.data.tokenizing import tokenize
from axolotl_mopo.digests import fingerprint, model_digest
from axolotl_mopo.errors import ConfigError, DataError, RowError
from axolotl_mopo.evaluation.comparison import Comparison
from axolotl_mopo.evaluation.engines import Engine
from axolotl_mopo.evaluation.models import CompletionLogps, Models
from axolotl_mopo.evaluation.policies import Policy, check_distinct, require_weights
from axolotl_mopo.evaluation.prompts import Prompts
from axolotl_mopo.evaluation.schema import PromptChoice, Response, Sampling, is_unanswered, prompt_of


@dataclass(frozen=True)
class _Asked:
    """The prompts as a policy gets them."""

    texts: list[str]
    ids: list[list[int]]
    parser: ReasoningParser
    """Parts its responses."""

    def parts(self, number: int, tokens: Sequence[int], finished: bool) -> dict[str, Any]:
        """The answer of a response to a prompt, and its reasoning if it has some, as columns."""
        reasoning, answer, count = self.parser.part(self.texts[number], tokens, finished)
        if reasoning is None:
            return {"response": answer}
        return {"response": answer, "reasoning": reasoning, "reasoning_tokens": count}


@dataclass
class Generation:
    """Generates the responses of a comparison, and computes their log-probs.

    Args:
        folder: folder of the comparison.
        prompts: the prompts.
        sampling: sampling settings.
        asking: which of AMoPO's prompts to use.
        engine: generates the responses.
        models: loads the models that compute the log-probs.
        batch_size: number of prompts, or of responses, in a batch.
        log: prints a line for the user.
        chat_template_kwargs: variables of the chat template for all policies; by default each has those that it was
            trained with.
    """

    folder: Path
    prompts: Prompts
    sampling: Sampling
    asking: PromptChoice
    engine: Engine
    models: Models
    batch_size: int
    log: Callable[[str], None]
    chat_template_kwargs: dict[str, Any] | None = None

    def run(self, policies: Sequence[Policy], reference: Policy | None) -> None:
        """Generate the missing responses and compute the missing log-probs.

        Args:
            policies: policies to compare.
            reference: reference model, if any.

        Raises:
            ConfigError: if a policy cannot be run, or the folder's responses were generated with other settings.
            DataError: if a policy cannot be given a prompt. Nothing is saved in this case.
        """
        if self.sampling.temperature == 0 and self.sampling.samples > 1:
            raise ConfigError("--temperature 0 gives the same response every time; use --samples 1")
        policies = [*policies, *([reference] if reference else [])]
        check_distinct(policies)
        for policy in policies:
            require_weights(policy.whole, policy.name)
            self._check_stops(policy, self.engine.check(policy, _tokenizer(policy.tokenizer)))
        policies = [replace(policy, digest=model_digest(policy.path)) for policy in policies]
        reference = policies[-1] if reference else None
        asked = {policy.name: self._asked(policy) for policy in policies}
        with Comparison.opened(self.folder) as comparison:
            self._agree(comparison, policies, reference)
            for policy in sorted(policies, key=lambda policy: policy.whole):
                self._draw(comparison, policy, asked[policy.name])
            self.engine.close()
            for policy in sorted(policies, key=lambda policy: policy.whole):
                self._add_logps(comparison, "logp", policy, policy, asked[policy.name])
            if reference:
                for policy in policies:
                    if self._vocabulary(policy) != self._vocabulary(reference):
                        self.log(
                            f"{policy.name} has another vocabulary than the reference, so its KL is not estimated."
                        )
                    else:
                        self._add_logps(comparison, "ref_logp", policy, reference, asked[policy.name])
            for policy in policies:
                self._report_cut(policy, comparison.responses(policy.name))

    def _agree(self, comparison: Comparison, policies: Sequence[Policy], reference: Policy | None) -> None:
        comparison.agree(
            prompts={"count": len(self.prompts.conversations), "digest": self.prompts.digest},
            sampling=asdict(self.sampling),
            asking=asdict(self.asking),
            reference=reference and reference.path,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        comparison.name_source(self.prompts.source)
        for policy in policies:
            comparison.add_policy(policy)
        comparison.save_settings()

    def _asked(self, policy: Policy) -> _Asked:
        """Every prompt as text and as token ids."""
        tokenizer = _tokenizer(policy.tokenizer)
        kwargs = policy.chat_template_kwargs if self.chat_template_kwargs is None else self.chat_template_kwargs
        try:
            renderer = ChatRenderer(tokenizer, kwargs)
        except DataError as error:
            raise DataError(f"{policy.name}: {error}") from None
        limit = getattr(_config(policy.whole), "max_position_embeddings", None)
        vocabulary = self._vocabulary(policy)
        asked = _Asked([], [], ReasoningParser(tokenizer, renderer))
        for number, messages in enumerate(self.prompts.conversations):
            where = f"{self.prompts.source}, prompt {number}, for {policy.name}"
            try:
                inputs = self.prompts.inputs_of(number)
                own = policy.asked(messages, self.asking)
                renderer.check_prompt(own, inputs)
                text = renderer.prompt(own, inputs)
                (ids,) = tokenize(tokenizer, [text])
            except RowError as error:
                raise DataError(f"{where}: {error}") from None
            if limit and len(ids) + self.sampling.max_new_tokens > limit:
                raise DataError(
                    f"{where}: its {len(ids)} tokens and --max-new-tokens {self.sampling.max_new_tokens} exceed the "
                    f"model's limit of {limit}; remove the prompt, or lower --max-new-tokens"
                )
            if max(ids) >= vocabulary:
                raise DataError(
                    f"{where}: the tokenizer in {policy.tokenizer} produces token {max(ids)}, and the vocabulary of "
                    f"{policy.whole} has {vocabulary:,}; use a --reference with the same vocabulary, or none"
                )
            asked.texts.append(text)
            asked.ids.append(ids)
        return asked

    def _draw(self, comparison: Comparison, policy: Policy, asked: _Asked) -> None:
        """Generate the responses to prompts that lack some. Seeds make a response independent of when it is drawn."""
        rows = comparison.responses(policy.name)
        self._check(rows, policy, asked)
        samples = Counter(row["prompt_id"] for row in rows)
        done = {prompt for prompt, count in samples.items() if count == self.sampling.samples}
        if len(done) < len(samples):
            comparison.replace(policy.name, [row for row in rows if row["prompt_id"] in done])
        missing = sorted(set(range(len(asked.ids))) - done, key=lambda number: (-len(asked.ids[number]), number))
        if not missing:
            self.log(f"{policy.name}: all {len(rows):,} responses exist already.")
            return
        tokenizer = _tokenizer(policy.tokenizer)
        with self.engine.running(policy, tokenizer) as draw:
            for start in tqdm(range(0, len(missing), self.batch_size), desc=policy.name):
                batch = missing[start : start + self.batch_size]
                drawn = draw([asked.ids[number] for number in batch], [self._seed(number) for number in batch])
                comparison.append(policy.name, self._rows(batch, drawn, asked))

    def _check_stops(self, policy: Policy, stops: Sequence[int]) -> None:
        if stops[-1] >= (vocabulary := self._vocabulary(policy)):
            raise ConfigError(
                f"{policy.name} has the stop token {stops[-1]}, and the vocabulary of {policy.whole} has "
                f"{vocabulary:,}; fix its generation_config.json or its tokenizer"
            )

    def _check(self, rows: Sequence[Response], policy: Policy, own: _Asked) -> None:
        """Refuse existing responses that do not belong to the prompts, the samples or the vocabulary.

        Responses of a version that did not part reasoning from the answer are refused as well, since scores of them
        and of newer ones are not of the same texts.
        """
        conversations, vocabulary = self.prompts.conversations, self._vocabulary(policy)
        for row in rows:
            prompt, sample = row["prompt_id"], row["sample"]
            asked = prompt < len(conversations) and sample < self.sampling.samples
            if not asked or prompt_of(row) != self.prompts.content(prompt):
                fault = "does not belong to the prompts and --samples"
            elif max(row["token_ids"]) >= vocabulary:
                fault = f"has token {max(row['token_ids'])}, and the vocabulary of {policy.whole} has {vocabulary:,}"
            elif "reasoning" not in row and "reasoning" in own.parts(prompt, row["token_ids"], row["finished"]):
                fault = "was generated by an older version, which did not part its reasoning from the answer"
            else:
                continue
            raise ConfigError(
                f"the response of {policy.name} to prompt {prompt}, sample {sample}, in {self.folder} {fault}; remove "
                "its line, or choose another --out"
            )

    def _seed(self, prompt: int) -> int:
        return fingerprint([self.sampling.seed, self.prompts.content(prompt)])

    def _rows(self, batch: Sequence[int], drawn: list[list[tuple[list[int], bool]]], asked: _Asked) -> list[Response]:
        rows: list[Any] = [
            {
                "prompt_id": prompt,
                "sample": sample,
                "prompt": self.prompts.conversations[prompt],
                **self.prompts.inputs_of(prompt).to_row(),
                **asked.parts(prompt, tokens, finished),
                "token_ids": tokens,
                "finished": finished,
            }
            for prompt, responses in zip(batch, drawn, strict=True)
            for sample, (tokens, finished) in enumerate(responses)
        ]
        return rows

    def _report_cut(self, policy: Policy, rows: Sequence[Response]) -> None:
        """Log how many responses were cut off, and how many have no answer."""
        cut = [row for row in rows if not row["finished"]]
        inside, ended = sum(map(is_unanswered, cut)), sum(row["finished"] and is_unanswered(row) for row in rows)
        if cut:
            without = f", {inside:,} of them inside the reasoning, so they have no answer" if inside else ""
            self.log(
                f"{policy.name}: {len(cut):,} of {len(rows):,} responses were cut off at --max-new-tokens "
                f"{self.sampling.max_new_tokens}{without}. For longer ones raise it, and choose another --out."
            )
        if ended:
            self.log(
                f"{policy.name}: {ended:,} of {len(rows):,} responses ended with a stop token inside the reasoning, so "
                "they have no answer."
            )

    def _add_logps(self, comparison: Comparison, column: str, policy: Policy, model: Policy, asked: _Asked) -> None:
        """Add the log-probs of the responses under a model, as a column."""
        rows = comparison.responses(policy.name)
        if all(column in row for row in rows):
            return
        with self.models.running(model.path, model.base) as running:
            completion_logps = CompletionLogps(running, (asked.ids[rows[0]["prompt_id"]], rows[0]["token_ids"]))

            def logps(part: list[Response]) -> list[float]:
                prompts = [asked.ids[row["prompt_id"]] for row in part]
                return completion_logps(prompts, [row["token_ids"] for row in part])

            title = f"{policy.name}, {column}"
            values = comparison.compute(policy.name, column, model.digest, self.batch_size, logps, title)
        comparison.add_column(policy.name, column, values, [model.digest])

    @staticmethod
    def _vocabulary(policy: Policy) -> int:
        size: int = _config(policy.whole).vocab_size
        return size


@cache
def _tokenizer(path: str) -> Any:
    return AutoTokenizer.from_pretrained(path)


@cache
def _config(path: str) -> Any:
    return AutoConfig.from_pretrained(path).get_text_config()
