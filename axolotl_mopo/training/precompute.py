"""Computes reference log-probs and margin rewards of every row once before the first step, and caches them."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object, tqdm
from axolotl.utils.logging import get_logger
from datasets import Dataset
from torch import Tensor

from axolotl_mopo.config import MODPOConfig, RewardSource
from axolotl_mopo.config.model_files import ADAPTER
from axolotl_mopo.config.sources import TRAINING_KEYS
from axolotl_mopo.digests import digest, model_digest
from axolotl_mopo.digests.rows import rows_digest
from axolotl_mopo.digests.weights import policy_digests
from axolotl_mopo.errors import ConfigError, DataError
from axolotl_mopo.logprobs.attention import plain_implementation
from axolotl_mopo.logprobs.computer import in_mode
from axolotl_mopo.rewards import Rewards, TextSource
from axolotl_mopo.rewards.adapter_twin import unchanged, with_adapter
from axolotl_mopo.training.pair_logprobs import PairLogProbs, separate_model, without_adapters
from axolotl_mopo.training.prepared_rows import pair_lengths
from axolotl_mopo.training.table_cache import TableCache

LOG = get_logger("axolotl.mopo")

_VERSION = 3
"""Version of the tables; increase it if tables of older releases must not be used."""
_TOKENS = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids", "chosen_spans", "rejected_spans")
_TEXTS = ("messages", "chosen_turns", "rejected_turns", "chosen_text", "rejected_text")

ComputeRows = Callable[[Dataset, Sequence[int], bool], Tensor]
"""Rows, their numbers and whether to hide the progress bar -> [N, 2]."""


class Constants(NamedTuple):
    """What the loss of N rows needs besides the policy's log-probs."""

    reference: Tensor
    """Log-probs of the chosen and the rejected completion, [N, 2]."""
    margins: Tensor
    """Rewards of the J other objectives, clipped, normalised and scaled, [N, 2, J]."""


@dataclass
class Precomputation:
    """Computes the constants of rows, or reads them from the cache.

    Args:
        method: the `modpo:` block.
        model: the unwrapped policy before its first step.
        policy: computes log-probs under the policy as it is run.
        cache: the cache of tables.
        recorded: the `start` of a resumed run with sharded weights. Its initial policy cannot be run, so the log-probs
            must be in the cache.
    """

    method: MODPOConfig
    model: Any
    policy: PairLogProbs
    cache: TableCache
    recorded: dict[str, str] | None = None
    _tables: dict[str, Tensor] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.accelerator = self.policy.accelerator
        if self.recorded is None:
            base, policy = policy_digests(self.model)
            dtype = str(self._base.dtype).removeprefix("torch.")
            self.start = {"base": self._agreed(base), "initial": self._agreed(policy), "dtype": dtype}
        else:
            self.start = self.recorded

    @property
    def reference_is_policy(self) -> bool:
        """Whether the reference has the same weights as the initial policy."""
        return self.start[self.method.reference] == self.start["initial"]

    def constants(self, sets: Mapping[str, Dataset]) -> dict[str, Constants]:
        """Compute the constants of sets of rows; margins are normalised by the set `train`."""
        # Rows without spans are trained on as a whole.
        digests = {
            name: rows_digest(rows, [column for column in _TOKENS if column in rows.column_names])
            for name, rows in sets.items()
        }
        reference = {
            name: self.policy_logps(name, rows, digests[name], self.method.reference) for name, rows in sets.items()
        }
        margins = {name: torch.zeros(len(rows), 2, len(self.method.margins)) for name, rows in sets.items()}
        row_rewards = {name: self._row_rewards(rows) for name, rows in sets.items()}
        for index, (margin_name, source) in enumerate(self.method.margins.items()):
            raw = {}
            for name, rows in sets.items():
                responses = _PairResponses(self, margin_name, name, rows, digests[name], row_rewards[name])
                raw[name] = _clipped(source.rewards(responses), source)
            factor = source.scale / self._deviation(margin_name, source, raw)
            for name, rewards in raw.items():
                margins[name][:, :, index] = _fitting(rewards * factor, f"`{self.method.rl}.margins.{margin_name}`")
        return {name: Constants(reference[name], margins[name]) for name in sets}

    def _row_rewards(self, rows: Dataset) -> dict[str, Tensor]:
        """Read the rewards [N, 2] of the margins that are stored in the prepared rows."""
        names = list(self.method.row_settings.margins)
        if not names:
            return {}
        sides = [np.asarray(rows[f"{side}_margin_rewards"][:]) for side in ("chosen", "rejected")]
        table = torch.from_numpy(np.stack(sides, 1))
        return {name: table[:, :, index] for index, name in enumerate(names)}

    def policy_logps(self, set_name: str, rows: Dataset, rows_key: str, state: str) -> Tensor:
        """Log-probs [N, 2] of a set's rows under the initial policy or its base model (`state`: initial or base)."""
        title = f"Reference, {set_name}"

        def compute(rows: Dataset, numbers: Sequence[int], quiet: bool) -> Tensor:
            if self.recorded is not None:
                raise ConfigError(
                    f"`{self.method.rl}.cache_dir`: {title} of the resumed run is not in {self.cache.folder}, and "
                    "cannot be computed again because the weights are sharded; set it to the folder that the run used, "
                    "with the same data, or start a new run"
                )
            adapters: AbstractContextManager[None] = nullcontext()
            if self.start[state] != self.start["initial"]:
                adapters = without_adapters(self.model)
            with adapters, in_mode(self.policy.model, training=False):
                return self.policy.logps(rows, title)

        return self._logps(title, {"weights": self.start[state]}, rows, rows_key, compute)

    def adapter_logps(self, title: str, path: str, rows: Dataset, rows_key: str) -> Tensor:
        """Log-probs [N, 2] under the base model with the adapter at `path`."""

        def compute(rows: Dataset, numbers: Sequence[int], quiet: bool) -> Tensor:
            with unchanged(self.model, path), with_adapter(self.model, path) as adapted:
                return self.policy.of(adapted).logps(rows, title)

        weights = digest([self.start["base"], self.digest_once(path, partial(model_digest, path))])
        return self._logps(title, {"weights": weights}, rows, rows_key, compute)

    def separate_logps(self, title: str, path: str, rows: Dataset, rows_key: str) -> Tensor:
        """Log-probs [N, 2] under a whole model that is loaded temporarily."""

        def compute(rows: Dataset, numbers: Sequence[int], quiet: bool) -> Tensor:
            dtype = getattr(torch, self.start["dtype"])
            with separate_model(path, self._base, dtype, self.policy, rows) as model:
                return model.logps(rows, title)

        content = {"weights": self.digest_once(path, partial(model_digest, path)), "dtype": self.start["dtype"]}
        return self._logps(title, content, rows, rows_key, compute)

    @property
    def _base(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _logps(
        self, title: str, model: Mapping[str, str], rows: Dataset, rows_key: str, compute: ComputeRows
    ) -> Tensor:
        """Return the log-probs [N, 2] under a model, which `model` identifies."""
        how = {"precision": self.accelerator.mixed_precision, "attention": plain_implementation(self._base)}
        return self.table(title, {"rows": rows_key, **model, **how}, rows, compute)

    def digest_once(self, name: str, compute: Callable[[], str]) -> str:
        """A digest that all sets of rows share: that of a large model reads all of its files."""
        if name not in self._digests:
            self._digests[name] = compute()
        return self._digests[name]

    def table(self, title: str, content: Mapping[str, Any], rows: Dataset, compute: ComputeRows) -> Tensor:
        """Return a table [N, 2], from the cache if it has one whose name is the digest of `content`."""
        name = digest({"version": _VERSION, **content})
        if name not in self._tables:
            table, hit = self.cache.table(name, len(rows), lambda: self._over_ranks(title, rows, compute))
            self._tables[name] = table
            LOG.info(
                "%s: %s for %s pairs, %d bytes per pair (%s).",
                title,
                "found" if hit else "computed",
                f"{len(rows):,}",
                table.element_size() * table.shape[1],
                self.cache.path(name),
            )
        return self._tables[name]

    def _over_ranks(self, title: str, rows: Dataset, compute: ComputeRows) -> Tensor:
        """Compute a table with the same number of rows on every rank, the longest first.

        Raises:
            DataError: if a number is not finite; names the row.
        """
        world_size, rank = self.accelerator.num_processes, self.accelerator.process_index
        order = np.argsort(-pair_lengths(rows), kind="stable")
        padded = np.resize(order, -(-len(order) // world_size) * world_size)
        mine = padded[rank::world_size]
        values = compute(rows.select(mine), mine.tolist(), not self.accelerator.is_main_process)
        gathered = self.accelerator.gather(values.to(self.accelerator.device)).cpu()
        table = torch.empty(len(rows), 2, dtype=gathered.dtype)
        table[np.concatenate([padded[r::world_size] for r in range(world_size)])] = gathered
        if not table.isfinite().all():
            row = int((~table.isfinite().all(1)).nonzero()[0])
            raise DataError(
                f"{title}: row {row} of the prepared rows gets {table[row].tolist()}, which are not all finite; check "
                "this row and the model"
            )
        return table

    def _deviation(self, name: str, margin: RewardSource, raw: Mapping[str, Tensor]) -> float:
        """Return the divisor of `normalize`: the standard deviation of chosen minus rejected in the training set."""
        if margin.normalize == "none":
            return 1.0
        where = f"`{self.method.rl}.margins.{name}`"
        if "train" not in raw:
            raise DataError(f"{where}: `normalize` needs the training set, which is not given; set it to none")
        differences = raw["train"][:, 0] - raw["train"][:, 1]
        deviation = differences.double().std(correction=0).item()
        if deviation == 0:
            raise DataError(
                f"{where}: chosen minus rejected is the same for every pair, so it cannot be normalised; set "
                "`normalize: none`"
            )
        LOG.info("The margin %s is divided by %g, the standard deviation of chosen minus rejected.", name, deviation)
        return deviation

    def _agreed(self, weights: str) -> str:
        """Combine the digests of all ranks into one, since each rank may have only a part of the weights."""
        parts = sorted(set(gather_object([weights])))
        return parts[0] if len(parts) == 1 else digest(parts)


@dataclass(frozen=True)
class _PairResponses:
    """The responses of one set of pairs, for the source of one margin; see `Responses`. Every method returns [N, 2]."""

    precomputation: Precomputation
    margin: str
    set_name: str
    rows: Dataset
    rows_key: str
    own: Mapping[str, Tensor]
    """Margin name -> rewards that are stored in the rows."""

    @property
    def title(self) -> str:
        """Title of messages and progress bars."""
        return f"Margin {self.margin}, {self.set_name}"

    def row_rewards(self, source: RewardSource) -> Tensor:
        """Return the rewards that were computed when the rows were prepared."""
        return self.own[self.margin]

    def text_rewards(self, source: TextSource) -> Tensor:
        """Compute the rewards, or read them from the cache."""
        if source.code:
            LOG.info("The margin %s runs the code of %s.", self.margin, source.code)
        device = self.precomputation.accelerator.device

        def compute(rows: Dataset, numbers: Sequence[int], quiet: bool) -> Tensor:
            with source.opened(device) as rewards:
                return both_sides(rewards, rows, numbers, source.batch_size, self.title, quiet)

        made_by = self.precomputation.digest_once(source.model_dump_json(), source.content_digest)
        settings = source.model_dump(mode="json", exclude={*TRAINING_KEYS, "batch_size", "path"})
        content = {"texts": rows_digest(self.rows, _TEXTS), "settings": settings, "source": made_by}
        return self.precomputation.table(self.title, content, self.rows, compute)

    def logps(self, path: str) -> Tensor:
        """Return log-probs under an adapter on the base model, or under a whole model."""
        part = (self.title, path, self.rows, self.rows_key)
        is_adapter = (Path(path) / ADAPTER).exists()
        return self.precomputation.adapter_logps(*part) if is_adapter else self.precomputation.separate_logps(*part)

    def reference_logps(self, path: str, reference: str | None) -> Tensor:
        """Return log-probs under a whole model, or under the run's base model."""
        if reference is None:
            return self.precomputation.policy_logps(self.set_name, self.rows, self.rows_key, "base")
        return self.precomputation.separate_logps(self.title, reference, self.rows, self.rows_key)


def both_sides(
    rewards: Rewards, rows: Dataset, numbers: Sequence[int], batch_size: int, title: str, quiet: bool
) -> Tensor:
    """Compute the rewards of both responses of N prepared rows, [N, 2]."""
    table = torch.zeros(len(rows), 2)
    batches: Iterator[Any] = rows.select_columns(list(_TEXTS)).iter(batch_size)
    total = math.ceil(len(rows) / batch_size)
    for number, batch in enumerate(tqdm(batches, desc=title, total=total, disable=quiet)):
        prompts = [json.loads(text) for text in batch["messages"]]
        part = slice(number * batch_size, number * batch_size + len(prompts))
        for index, side in enumerate(("chosen", "rejected")):
            before = [
                [*prompt, *json.loads(turns)] for prompt, turns in zip(prompts, batch[f"{side}_turns"], strict=True)
            ]
            table[part, index] = torch.tensor(rewards(before, batch[f"{side}_text"], numbers[part]))
    return table


def _fitting(rewards: Tensor, where: str) -> Tensor:
    """Convert rewards [N, 2] to float32.

    Raises:
        DataError: if one is too large for float32.
    """
    bad = ~rewards.float().isfinite()
    if bad.any():
        row, side = (int(index) for index in bad.nonzero()[0])
        raise DataError(
            f"{where}: the reward {rewards[row, side]:g} of row {row} of the prepared rows is too large for float32; "
            "set `clip`, or a smaller `scale`"
        )
    return rewards.float()


def _clipped(rewards: Tensor, source: RewardSource) -> Tensor:
    return rewards.clamp(*source.clip) if source.clip else rewards
