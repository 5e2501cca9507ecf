"""One pass before the first step: reference log-probs and margin rewards of every row, computed once and kept."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from axolotl.utils.logging import get_logger
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig

from axolotl_mopo.config import AdapterMargin, ConfigError, MarginBlock, MODPOConfig, RewardModelMargin, TextMargin
from axolotl_mopo.data.lengths import pair_lengths
from axolotl_mopo.data.rows import DataError
from axolotl_mopo.engine.attention import plain_implementation
from axolotl_mopo.engine.scoring import in_mode
from axolotl_mopo.margins.adapters import unchanged, with_adapter
from axolotl_mopo.margins.cache import TableCache
from axolotl_mopo.margins.fingerprint import digest, model_files_digest, policy_digests, rows_digest
from axolotl_mopo.margins.functions import function_digest, function_name
from axolotl_mopo.margins.implicit import PairScorer, separate_model, without_adapters
from axolotl_mopo.margins.rewards import both_sides, function_rewards, model_rewards
from axolotl_mopo.margins.rows import row_margin_names

LOG = get_logger("axolotl.mopo")

_VERSION = 2
"""Of the tables: one more where a table of an older release must not be found."""
_TOKENS = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
_TEXTS = ("messages", "chosen_text", "rejected_text")

Score = Callable[[Dataset, Sequence[int], bool], Tensor]
"""Rows, their numbers and whether to show no progress -> [N, 2]."""


class Constants(NamedTuple):
    """What a step needs of N rows besides the policy."""

    reference: Tensor
    """Log-probs of the chosen and the rejected completion, [N, 2]."""
    margins: Tensor
    """Rewards of the J other objectives, clipped, normalised and scaled, [N, 2, J]."""


@dataclass
class Precomputation:
    """Computes the constants of rows, or finds them in the cache.

    Args:
        method: the `modpo:` block.
        model: the policy as it stood before its first step, not wrapped.
        policy: the same as it is run, and how it is scored.
        cache: where tables are kept.
        recorded: the `start` of the run that is resumed, where the model cannot be run as it was then: what is computed
            with it can only be found.
    """

    method: MODPOConfig
    model: Any
    policy: PairScorer
    cache: TableCache
    recorded: dict[str, str] | None = None
    _tables: dict[str, Tensor] = field(default_factory=dict)

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
        """Whether the reference is the policy as it stands."""
        return self.start[self.method.reference] == self.start["initial"]

    def constants(self, sets: Mapping[str, Dataset]) -> dict[str, Constants]:
        """The constants of sets of rows; the set `train`, if there, decides how margins are normalised."""
        digests = {name: rows_digest(rows, _TOKENS) for name, rows in sets.items()}
        reference = {
            name: self._policy_logps(name, rows, digests[name], self.method.reference) for name, rows in sets.items()
        }
        margins = {name: [torch.empty(0)] * 0 for name in sets}
        for margin_name, margin in self.method.margins.items():
            raw = {
                name: _clipped(self._rewards(margin_name, margin, name, rows, digests[name]), margin)
                for name, rows in sets.items()
            }
            factor = margin.scale / self._spread(margin_name, margin, raw)
            for name, rewards in raw.items():
                margins[name].append(_fitting(rewards * factor, f"`{self.method.rl}.margins.{margin_name}`"))
        return {
            name: Constants(
                reference[name],
                torch.stack(margins[name], -1) if margins[name] else torch.zeros(len(rows), 2, 0),
            )
            for name, rows in sets.items()
        }

    def _rewards(self, margin_name: str, margin: MarginBlock, set_name: str, rows: Dataset, rows_key: str) -> Tensor:
        title = f"Margin {margin_name}, {set_name}"
        match margin:
            case AdapterMargin():
                beta = margin.beta
                assert beta  # noqa: S101 (settled with the configuration)
                if margin.reference is not None:
                    model, reference = (
                        self._separate_logps(title, path, rows, rows_key) for path in (margin.path, margin.reference)
                    )
                else:
                    model = self._adapter_logps(title, margin.path, rows, rows_key)
                    reference = self._policy_logps(set_name, rows, rows_key, "base")
                return beta * (model - reference)
            case RewardModelMargin():
                source = {"model": model_digest(margin.path), "head": margin.head, "dtype": margin.dtype}

                def by_model(rows: Dataset, numbers: Sequence[int], quiet: bool) -> Tensor:
                    with model_rewards(margin, self.accelerator.device) as rewards:
                        return both_sides(rewards, rows, numbers, margin.batch_size, title, quiet)

                return self._table(title, {"texts": rows_digest(rows, _TEXTS), **source}, rows, by_model)
            case TextMargin():
                LOG.info("The margin %s runs the code of %s.", margin_name, function_name(margin))

                def by_function(rows: Dataset, numbers: Sequence[int], quiet: bool) -> Tensor:
                    return both_sides(function_rewards(margin), rows, numbers, margin.batch_size, title, quiet)

                content = {"texts": rows_digest(rows, _TEXTS), "function": function_digest(margin)}
                return self._table(title, content, rows, by_function)
            case _:
                column = row_margin_names(self.method).index(margin_name)
                sides = [np.asarray(rows[f"{side}_margins"][:])[:, column] for side in ("chosen", "rejected")]
                return torch.from_numpy(np.stack(sides, -1))

    def _policy_logps(self, set_name: str, rows: Dataset, rows_key: str, state: str) -> Tensor:
        title = f"Reference, {set_name}"

        def score(rows: Dataset, numbers: Sequence[int], quiet: bool) -> Tensor:
            if self.recorded is not None:
                raise ConfigError(
                    f"`{self.method.rl}.cache_dir`: {title} of the run that is resumed is not in {self.cache.folder}, "
                    "and cannot be computed again from a model whose weights are split; give the folder that the run "
                    "used, with the same data, or start the run anew"
                )
            adapters: AbstractContextManager[None] = nullcontext()
            if self.start[state] != self.start["initial"]:
                adapters = without_adapters(self.model)
            with adapters, in_mode(self.policy.model, training=False):
                return self.policy.logps(rows, title)

        return self._logps(title, {"weights": self.start[state]}, rows, rows_key, score)

    def _adapter_logps(self, title: str, path: str, rows: Dataset, rows_key: str) -> Tensor:
        def score(rows: Dataset, numbers: Sequence[int], quiet: bool) -> Tensor:
            with unchanged(self.model, path), with_adapter(self.model, path) as adapted:
                return self.policy.of(adapted).logps(rows, title)

        weights = digest([self.start["base"], model_digest(path)])
        return self._logps(title, {"weights": weights}, rows, rows_key, score)

    def _separate_logps(self, title: str, path: str, rows: Dataset, rows_key: str) -> Tensor:
        def score(rows: Dataset, numbers: Sequence[int], quiet: bool) -> Tensor:
            dtype = getattr(torch, self.start["dtype"])
            with separate_model(path, self._base, dtype, self.policy, rows) as model:
                return model.logps(rows, title)

        content = {"weights": model_digest(path), "dtype": self.start["dtype"]}
        return self._logps(title, content, rows, rows_key, score)

    @property
    def _base(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _logps(self, title: str, model: Mapping[str, str], rows: Dataset, rows_key: str, score: Score) -> Tensor:
        """The log-probs of a model, which is known by what `model` says of it."""
        how = {"precision": self.accelerator.mixed_precision, "attention": plain_implementation(self._base)}
        return self._table(title, {"rows": rows_key, **model, **how}, rows, score)

    def _table(self, title: str, content: Mapping[str, Any], rows: Dataset, score: Score) -> Tensor:
        name = digest({"version": _VERSION, **content})
        if name not in self._tables:
            table, hit = self.cache.table(name, len(rows), lambda: self._spread_over_ranks(title, rows, score))
            self._tables[name] = table
            LOG.info(
                "%s: %s for %s pairs, %d bytes a pair (%s).",
                title,
                "found" if hit else "computed",
                f"{len(rows):,}",
                table.element_size() * table.shape[1],
                self.cache.path(name),
            )
        return self._tables[name]

    def _spread_over_ranks(self, title: str, rows: Dataset, score: Score) -> Tensor:
        """Every rank scores the same number of rows, the longest first.

        Raises:
            DataError: where a row's numbers are not finite.
        """
        world_size, rank = self.accelerator.num_processes, self.accelerator.process_index
        order = np.argsort(-pair_lengths(rows), kind="stable")
        padded = np.resize(order, -(-len(order) // world_size) * world_size)
        mine = padded[rank::world_size]
        scores = score(rows.select(mine), mine.tolist(), not self.accelerator.is_main_process)
        gathered = self.accelerator.gather(scores.to(self.accelerator.device)).cpu()
        table = torch.empty(len(rows), 2, dtype=gathered.dtype)
        table[np.concatenate([padded[r::world_size] for r in range(world_size)])] = gathered
        if not table.isfinite().all():
            row = int((~table.isfinite().all(1)).nonzero()[0])
            raise DataError(f"{title}: row {row} of the prepared rows gets {table[row].tolist()}, not finite numbers")
        return table

    def _spread(self, name: str, margin: MarginBlock, raw: Mapping[str, Tensor]) -> float:
        """What `normalize` divides a margin by: the standard deviation of its differences in the training set."""
        if margin.normalize == "none":
            return 1.0
        where = f"`{self.method.rl}.margins.{name}`"
        if "train" not in raw:
            raise DataError(f"{where} is normalised by the training set, and there is none here")
        differences = raw["train"][:, 0] - raw["train"][:, 1]
        spread = differences.double().std(correction=0).item()
        if spread == 0:
            raise DataError(f"{where} is the same difference for every pair; it cannot be normalised")
        LOG.info("The margin %s is divided by %g, the standard deviation of its differences.", name, spread)
        return spread

    def _agreed(self, weights: str) -> str:
        """One name for the weights of all ranks, each of which may hold a part of them."""
        parts = sorted(set(gather_object([weights])))
        return parts[0] if len(parts) == 1 else digest(parts)


def model_digest(path: str) -> str:
    """A name made of a model's files, or of the commit that the hub gives them.

    Raises:
        ConfigError: where neither this machine nor the hub has it.
    """
    if Path(path).is_dir():
        return model_files_digest(Path(path))
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise ConfigError(f"the model {path} cannot be loaded: {error}") from None
    return digest([path, getattr(config, "_commit_hash", None)])


def _fitting(rewards: Tensor, where: str) -> Tensor:
    """Rewards as float32, [N, 2].

    Raises:
        DataError: where one is too large for that.
    """
    bad = ~rewards.float().isfinite()
    if bad.any():
        row, side = (int(index) for index in bad.nonzero()[0])
        raise DataError(
            f"{where}: the reward {rewards[row, side]:g}, of row {row} of the prepared rows, is too large for float32; "
            "give the margin a `clip`, or a smaller `scale`"
        )
    return rewards.float()


def _clipped(rewards: Tensor, margin: MarginBlock) -> Tensor:
    return rewards.clamp(*margin.clip) if margin.clip else rewards
