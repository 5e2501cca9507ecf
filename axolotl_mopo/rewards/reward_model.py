"""`source: reward_model`: the score of a sequence-classification model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from axolotl_mopo.config.model_files import ModelConfig, read_model_file
from axolotl_mopo.config.settings import number
from axolotl_mopo.config.sources import ModelKind
from axolotl_mopo.data.rows import Message
from axolotl_mopo.digests import model_digest
from axolotl_mopo.errors import ConfigError, DataError, RowError
from axolotl_mopo.log import warn
from axolotl_mopo.rewards.text import Rewards, TextSource

if TYPE_CHECKING:
    import torch

_WITHOUT_SCORES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class RewardModelSource(TextSource):
    """The reward is the score of a sequence-classification model, with its own tokenizer and chat template."""

    source: Literal["reward_model"]
    path: str = Field(description="Reward model: a folder or a model of the hub.")
    head: int | str | None = Field(
        None,
        description=(
            "Score of the model that is the reward: an index, or a label of its config. Required if the model has "
            "several."
        ),
    )
    batch_size: int = Field(
        16, ge=1, strict=True, description="Number of responses that are scored at a time, at least 1."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="Precision of the reward model: float32, bfloat16 or float16."
    )

    argument: ClassVar = "path"

    @field_validator("head", mode="before")
    @classmethod
    def _no_boolean(cls, head: Any) -> Any:
        return number(head)

    @property
    def model_paths(self) -> dict[str, ModelKind]:
        """See `RewardSource`."""
        return {"path": "classifier"}

    @property
    def code(self) -> None:
        """None, since the model runs no code of the user."""
        return None

    def resolve(self, where: str, run: Mapping[str, Any]) -> Self:
        """Check `head` against the config of a local model; see `RewardSource`."""
        folder = Path(self.path)
        path = folder / "config.json"
        if not path.exists():
            if folder.exists():
                raise ConfigError(
                    f"{where}.path`: {folder} contains no config.json; give the folder of a whole reward model"
                )
            warn("%s.path`: %s is not a local folder and is downloaded from the model hub.", where, self.path)
            return self
        config = read_model_file(ModelConfig, path, f"{where}.path`")
        kinds = config.architectures or []
        if kinds and all(kind.endswith(_WITHOUT_SCORES) for kind in kinds):
            raise ConfigError(
                f"{where}.path`: {folder} is a {kinds[0]}, which has no classification head; give a "
                "sequence-classification model, or use `source: adapter` for an implicit reward"
            )
        labels = config.id2label or {"0": "LABEL_0", "1": "LABEL_1"}
        if odd := [index for index in labels if not index.isdecimal()]:
            raise ConfigError(f"{where}.path`: {path}, `id2label`: {odd[0]!r:.60} is not an index; correct the file")
        try:
            self._head({str(name): int(index) for index, name in labels.items()})
        except ConfigError as error:
            raise ConfigError(f"{where}.head`: {error}") from None
        return self

    def content_digest(self) -> str:
        """Return a digest of the model's files."""
        return model_digest(self.path)

    @contextmanager
    def opened(self, device: "torch.device") -> Iterator[Rewards]:
        """Context manager that loads the model; see `TextSource`.

        Raises:
            ConfigError: if `head` does not fit the model, or its tokenizer has no chat template.
            DataError: from the yielded function, if a conversation cannot be rendered or is too long for the model, or
                a reward is not finite.
        """
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from axolotl_mopo.data.reasoning import joined
        from axolotl_mopo.data.rendering import render_chat
        from axolotl_mopo.data.template_form import find_form
        from axolotl_mopo.rewards.loading import load_whole

        tokenizer: Any = AutoTokenizer.from_pretrained(self.path)
        model = load_whole(AutoModelForSequenceClassification, self.path, getattr(torch, self.dtype))
        head = self._head({str(name): index for name, index in (model.config.label2id or {}).items()})
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer of {self.path} has no chat template; use `source: callable` with a function that runs "
                "the model"
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        limit = getattr(model.config, "max_position_embeddings", None) or math.inf
        model.to(device).eval()

        form = find_form(partial(render_chat, tokenizer))

        def rendered(prompt: list[Message], response: str, number: int, reasoning: str | None) -> str:
            # `shaped` parts the text again if the template prints reasoning.
            turn = {"role": "assistant", "content": joined(reasoning, response)}
            try:
                text = render_chat(tokenizer, [form.shaped(each) for each in [*prompt, turn]])
            except RowError as error:
                raise DataError(f"{self.path}, row {number}: {error}") from None
            if reasoning and reasoning.strip() not in text:
                raise DataError(
                    f"{self.path}, row {number}: its chat template leaves out the reasoning of the response; score "
                    "the answers alone, without --with-reasoning"
                )
            return text

        @torch.no_grad()
        def rewards(
            prompts: list[list[Message]],
            responses: list[str],
            numbers: Sequence[int],
            reasoning: Sequence[str | None] | None = None,
        ) -> list[float]:
            thoughts = [None] * len(responses) if reasoning is None else reasoning
            texts = [rendered(*each) for each in zip(prompts, responses, numbers, thoughts, strict=True)]
            inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
            if (length := inputs["input_ids"].shape[1]) > limit:
                raise DataError(
                    f"{self.path} supports up to {limit} tokens; one of the rows {list(numbers)} has {length}. Remove "
                    "such rows, or give a reward model with a longer context"
                )
            values = model(**inputs.to(device)).logits[:, head].float().tolist()
            if bad := [number for number, value in zip(numbers, values, strict=True) if not math.isfinite(value)]:
                raise DataError(
                    f"{self.path} gives row {bad[0]} a reward that is not finite; look at this row, or set another "
                    "`dtype`"
                )
            return values

        try:
            yield rewards
        finally:
            model.to("meta")  # frees the memory even if there are still references to the model

    def _head(self, labels: Mapping[str, int]) -> int:
        """Return the index of the score that `head` selects.

        Args:
            labels: names and indices of the scores, from the model's config.

        Raises:
            ConfigError: if the model has no such score, or has several and `head` is not set.
        """
        choices = f"set `head` to one of the {len(labels)} scores of {self.path}: {', '.join(labels)}"
        if self.head is None and len(labels) != 1:
            raise ConfigError(f"the model has several scores, but `head` is not set; {choices}")
        if isinstance(self.head, str):
            if self.head not in labels:
                raise ConfigError(f"the model has no score named {self.head!r}; {choices}")
            return labels[self.head]
        head = self.head or 0
        if head not in labels.values():
            raise ConfigError(f"the model has no score with the index {head}; {choices}")
        return head
