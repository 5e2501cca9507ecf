"""`axolotl mopo generate`: the responses of every policy, and their log-probs under it and under the reference."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from accelerate.utils import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from axolotl_mopo.data.rows import DataError, RowError, fingerprint
from axolotl_mopo.data.tokenizing import ChatRenderer, tokenize
from axolotl_mopo.front.engines import Engine
from axolotl_mopo.front.models import Models, Sampling, SequenceScorer
from axolotl_mopo.front.policies import Asking, Policy
from axolotl_mopo.front.prompts import Prompts
from axolotl_mopo.front.store import Comparison, Response
from axolotl_mopo.margins.precompute import model_digest


@dataclass
class Generation:
    """Fills a comparison with responses.

    Args:
        comparison: where they are kept.
        prompts: what is asked.
        sampling: how responses are drawn.
        asking: which of AMoPO's prompts to use.
        engine: draws.
        models: compute log-probs.
        batch_size: prompts, or responses, at a time.
        say: tells the user what was done.
    """

    comparison: Comparison
    prompts: Prompts
    sampling: Sampling
    asking: Asking
    engine: Engine
    models: Models
    batch_size: int
    say: Callable[[str], None]

    def run(self, policies: Sequence[Policy], reference: Policy | None) -> None:
        """Generate what is missing.

        Args:
            policies: to compare.
            reference: the model that they are compared with, if any.

        Raises:
            ConfigError: where the folder's responses were made otherwise.
            DataError: where a prompt cannot be asked; nothing is generated then.
        """
        policies = [*policies, *([reference] if reference else [])]
        policies = [replace(policy, digest=model_digest(policy.path)) for policy in policies]
        asked = {policy.name: self._asked(policy) for policy in policies}
        with self.comparison.locked():
            self._agree(policies, reference)
            for policy in sorted(policies, key=lambda policy: policy.whole):
                self._draw(policy, asked[policy.name])
            self.engine.close()
            for policy in sorted(policies, key=lambda policy: policy.whole):
                self._score("logp", policy, policy, asked[policy.name])
            if reference:
                for policy in policies:
                    if self._vocabulary(policy) != self._vocabulary(reference):
                        self.say(
                            f"{policy.name} has another vocabulary than the reference, so its KL is not estimated."
                        )
                    else:
                        self._score("ref_logp", policy, reference, asked[policy.name])

    def _agree(self, policies: Sequence[Policy], reference: Policy | None) -> None:
        self.comparison.agree(
            prompts={"count": len(self.prompts.conversations), "digest": self.prompts.digest},
            sampling=asdict(self.sampling),
            asking=asdict(self.asking),
            reference=reference and reference.path,
        )
        self.comparison.settings.setdefault("source", self.prompts.source)
        for policy in policies:
            self.comparison.add_policy(policy)
        self.comparison.save_settings()

    def _asked(self, policy: Policy) -> list[list[int]]:
        """Every prompt as token ids."""
        tokenizer = _tokenizer(policy.tokenizer)
        try:
            renderer = ChatRenderer(tokenizer)
        except DataError as error:
            raise DataError(f"{policy.name}: {error}") from None
        limit = getattr(_config(policy.whole), "max_position_embeddings", None)
        asked = []
        for number, messages in enumerate(self.prompts.conversations):
            where = f"{self.prompts.source}, prompt {number}, asked of {policy.name}"
            try:
                (ids,) = tokenize(tokenizer, [renderer.prompt(policy.asked(messages, self.asking))])
            except RowError as error:
                raise DataError(f"{where}: {error}") from None
            if limit and len(ids) + self.sampling.max_new_tokens > limit:
                raise DataError(
                    f"{where}: its {len(ids)} tokens and --max-new-tokens {self.sampling.max_new_tokens} are more than "
                    f"the {limit} that the model takes; leave the prompt out, or ask for shorter responses"
                )
            asked.append(ids)
        return asked

    def _draw(self, policy: Policy, asked: list[list[int]]) -> None:
        """Generate the batches that are not there yet; every batch is the same, and drawn alike, whenever it is."""
        order = sorted(range(len(asked)), key=lambda number: -len(asked[number]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        rows = self.comparison.responses(policy.name)
        samples: dict[int, int] = {}
        for row in rows:
            samples[row["prompt_id"]] = samples.get(row["prompt_id"], 0) + 1
        done = [all(samples.get(number) == self.sampling.samples for number in batch) for batch in batches]
        kept = {number for batch, is_done in zip(batches, done, strict=True) if is_done for number in batch}
        if len(kept) < len(samples):
            self.comparison.replace(policy.name, [row for row in rows if row["prompt_id"] in kept])
        if all(done):
            self.say(f"{policy.name}: all {len(rows):,} responses are there.")
            return
        tokenizer = _tokenizer(policy.tokenizer)
        with self.engine.running(policy, tokenizer) as draw:
            for number, batch in enumerate(tqdm(batches, desc=policy.name)):
                if not done[number]:
                    seed = fingerprint([self.sampling.seed, number]) % 2**31
                    drawn = draw([asked[prompt] for prompt in batch], seed)
                    self.comparison.append(policy.name, self._rows(batch, drawn, tokenizer))

    def _rows(
        self, batch: Sequence[int], drawn: list[list[tuple[list[int], bool]]], tokenizer: PreTrainedTokenizerBase
    ) -> list[Response]:
        return [
            {
                "prompt_id": prompt,
                "sample": sample,
                "prompt": self.prompts.conversations[prompt],
                "response": tokenizer.decode(tokens, skip_special_tokens=True),
                "token_ids": tokens,
                "finished": finished,
            }
            for prompt, responses in zip(batch, drawn, strict=True)
            for sample, (tokens, finished) in enumerate(responses)
        ]

    def _score(self, column: str, policy: Policy, model: Policy, asked: list[list[int]]) -> None:
        """Fill in the responses' log-probs under a model."""
        rows = self.comparison.responses(policy.name)
        if all(column in row for row in rows):
            return
        with self.models.running(model.path, model.base) as running:
            scorer = SequenceScorer(running, (asked[rows[0]["prompt_id"]], rows[0]["token_ids"]))

            def logps(part: list[Response]) -> list[float]:
                return scorer([asked[row["prompt_id"]] for row in part], [row["token_ids"] for row in part])

            title = f"{policy.name}, {column}"
            values = self.comparison.compute(policy.name, column, model.digest, self.batch_size, logps, title)
        self.comparison.add_column(policy.name, column, values)

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
