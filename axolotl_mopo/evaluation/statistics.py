"""Compute the statistics of scored responses: means with intervals, win rates, divergence, the Pareto front."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import moocore
import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from axolotl_mopo.errors import ConfigError
from axolotl_mopo.evaluation.comparison import Comparison
from axolotl_mopo.evaluation.policies import Policy
from axolotl_mopo.evaluation.schema import Response, check_number, is_unanswered

_RESAMPLES = 2000
_CONFIDENCE = 0.95
_MOST_OBJECTIVES = 31
"""Maximum of moocore's hypervolume."""

Values = NDArray[np.float64]


class Estimate(NamedTuple):
    """A mean over prompts and its 95% bootstrap interval over prompts, which is NaN for a single prompt."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PolicyResult:
    """The results of a policy."""

    policy: Policy
    rewards: dict[str, Estimate]
    """Mean reward of every objective, with the scorer's sign."""
    win_rates: dict[str, float] | None
    """How often its response to a prompt is better than the reference's; ties count half. None without a reference."""
    kl: Estimate | None
    """KL(policy || reference) in nats per response, from the responses' log-ratios; None if log-probs are missing."""
    tokens: float
    """Mean number of tokens of a response."""
    finished: float
    """Fraction of responses that end with a stop token."""
    unanswered: int
    """Number of responses that ended inside their reasoning."""
    dominated_by: list[str]
    """Names of policies that are at least as good on every objective and better on one."""

    @property
    def on_front(self) -> bool:
        """Whether no other policy dominates it."""
        return not self.dominated_by


@dataclass(frozen=True)
class Front:
    """The results of all policies of a comparison, and the volume that they dominate."""

    objectives: list[str]
    lower_is_better: set[str]
    results: list[PolicyResult]
    reference_point: dict[str, float]
    """Reference point of the hypervolumes; by default the worst mean of each objective."""
    hypervolume: dict[str, float]
    """Hypervolume of the policies (`policies`), and together with baselines and reference (`all`)."""
    prompts: int
    samples: int
    """Number of responses to each prompt."""
    of_reasoning: list[str]
    """Objectives that are scored by reasoning and answer, not by the answer alone."""
    exact_sampling: bool
    """Whether responses were drawn from the policies' own distributions; if not, log-ratios do not estimate the KL."""

    def better(self, name: str) -> int:
        """1 if higher is better for an objective, -1 if lower is."""
        return -1 if name in self.lower_is_better else 1


def find_front(
    comparison: Comparison, objectives: Sequence[str] | None = None, reference_point: Mapping[str, float] | None = None
) -> Front:
    """Compare the policies of a scored comparison.

    Args:
        comparison: a comparison with responses and scores.
        objectives: objectives to compare by; by default all.
        reference_point: reference point of the hypervolumes; by default the worst means.

    Raises:
        ConfigError: if responses, scores or objectives are missing; names them.
    """
    names = list(objectives or comparison.objectives)
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"the objective {doubled[0]} is named twice; name every objective once")
    if len(names) > _MOST_OBJECTIVES:
        raise ConfigError(
            f"there are {len(names)} objectives; compare {_MOST_OBJECTIVES} of them at most, with --objectives"
        )
    if unknown := [name for name in names if name not in comparison.objectives]:
        raise ConfigError(
            f"{', '.join(unknown)} was not scored; scored: {', '.join(comparison.objectives) or 'no objectives'}; "
            "see axolotl mopo score --help"
        )
    if not names:
        raise ConfigError(f"{comparison.folder} has no scores; compute them with axolotl mopo score")
    _check_point(reference_point or {}, names)
    lower = {name for name in names if comparison.objectives[name].lower_is_better}
    responses = {policy.name: _complete(comparison, policy, names) for policy in comparison.policies}
    reference = next((policy.name for policy in comparison.policies if policy.kind == "reference"), None)
    rewards = {policy: {name: estimate(_means(rows, name)) for name in names} for policy, rows in responses.items()}
    means = {policy: np.array([each[name].mean for name in names]) for policy, each in rewards.items()}
    signs = np.array([-1 if name in lower else 1 for name in names])
    results = [
        PolicyResult(
            policy,
            rewards[policy.name],
            _win_rates(responses[policy.name], responses[reference], names, lower) if reference else None,
            _divergence(responses[policy.name]),
            float(np.mean([len(row["token_ids"]) for row in responses[policy.name]])),
            float(np.mean([row["finished"] for row in responses[policy.name]])),
            sum(map(is_unanswered, responses[policy.name])),
            [other for other, point in means.items() if _dominates(point * signs, means[policy.name] * signs)],
        )
        for policy in comparison.policies
    ]
    points = np.stack([means[result.policy.name] for result in results])
    worst = (points * signs).min(0) * signs
    begin = {name: float((reference_point or {}).get(name, worst[index])) for index, name in enumerate(names)}
    own = [index for index, result in enumerate(results) if result.policy.kind == "policy"]
    volumes = {"policies": points[own], "all": points}
    hypervolume = {
        which: float(moocore.hypervolume(part, ref=list(begin.values()), maximise=[*(signs > 0)]))
        for which, part in volumes.items()
    }
    if not all(map(math.isfinite, hypervolume.values())):
        raise ConfigError(
            f"the hypervolume of {len(names)} objectives is too large for a float; compare fewer of them with "
            "--objectives, or use scorers with smaller scales"
        )
    sampling, prompts = comparison.settings.sampling, comparison.settings.prompts
    assert sampling and prompts  # noqa: S101 (`_complete` has checked it)
    of_reasoning = [name for name in names if comparison.objectives[name].with_reasoning]
    sizes = prompts.count, sampling.samples
    return Front(names, lower, results, begin, hypervolume, *sizes, of_reasoning, sampling.exact)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value per prompt, with its interval."""
    sample = np.asarray(values, np.float64)
    if len(sample) < 2:
        return Estimate(float(sample.mean()), math.nan, math.nan)
    interval = bootstrap(
        (sample,), np.mean, n_resamples=_RESAMPLES, confidence_level=_CONFIDENCE, method="percentile", rng=0
    ).confidence_interval
    return Estimate(float(sample.mean()), float(interval.low), float(interval.high))


def _check_point(point: Mapping[str, float], names: Sequence[str]) -> None:
    if unknown := [name for name in point if name not in names]:
        raise ConfigError(
            f"--reference-point: {', '.join(unknown)} is not one of the compared objectives: {', '.join(names)}"
        )
    for name, value in point.items():
        try:
            check_number(value)
        except ValueError as error:
            raise ConfigError(f"--reference-point {name}: {error}") from None


def _complete(comparison: Comparison, policy: Policy, names: Sequence[str]) -> list[Response]:
    rows = comparison.complete(policy.name)
    if unscored := [name for name in names if any(name not in row for row in rows)]:
        raise ConfigError(
            f"{policy.name} has no scores of {', '.join(unscored)}, which other policies have; run axolotl mopo score "
            "again with the same scorer"
        )
    return rows


def _by_prompt(rows: Sequence[Response], column: str) -> dict[int, Values]:
    """The numbers of a column, grouped by prompt."""
    values: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        values[row["prompt_id"]].append(row[column])  # type: ignore[literal-required]
    return {prompt: np.asarray(own, np.float64) for prompt, own in values.items()}


def _means(rows: Sequence[Response], column: str) -> list[float]:
    """The mean of a column over the responses to each prompt."""
    return [float(own.mean()) for own in _by_prompt(rows, column).values()]


def _win_rates(
    rows: Sequence[Response], others: Sequence[Response], names: Sequence[str], lower: set[str]
) -> dict[str, float]:
    """Win rates of all pairs of a response and a reference's response to the same prompt; mean over prompts."""
    rates = {}
    for name in names:
        ours, theirs = _by_prompt(rows, name), _by_prompt(others, name)
        wins = [np.mean(np.sign(ours[prompt][:, None] - theirs[prompt][None])) for prompt in ours]
        rates[name] = float(0.5 + (-1 if name in lower else 1) * np.mean(wins) / 2)
    return rates


def _divergence(rows: Sequence[Response]) -> Estimate | None:
    if any("logp" not in row or "ref_logp" not in row for row in rows):
        return None
    ratios: list[Any] = [{**row, "log_ratio": row["logp"] - row["ref_logp"]} for row in rows]
    return estimate(_means(ratios, "log_ratio"))


def _dominates(point: Values, other: Values) -> bool:
    return bool((point >= other).all() and (point > other).any())
