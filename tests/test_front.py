"""The Pareto front of scored responses: statistics against numbers computed by hand, reports, and refusals."""

import csv
import io
import json
import math
import random
import re
import shutil
from collections import Counter
from itertools import combinations_with_replacement, product

import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from rich.console import Console
from scipy.stats import bootstrap

from axolotl_mopo.config.model_files import Manifest
from axolotl_mopo.data.conversations import user
from axolotl_mopo.digests import fingerprint
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.evaluation.comparison import Comparison
from axolotl_mopo.evaluation.page import render
from axolotl_mopo.evaluation.plots import draw
from axolotl_mopo.evaluation.policies import Policy
from axolotl_mopo.evaluation.report import notes, table, to_csv, to_json
from axolotl_mopo.evaluation.schema import Objective
from axolotl_mopo.evaluation.scoring import parse_scorer
from axolotl_mopo.evaluation.statistics import estimate, find_front

HELPFUL = {"scorer": {}, "digest": "x", "lower_is_better": False}
COST = {**HELPFUL, "lower_is_better": True}


def policy(name, kind="policy", weights=None):
    return Policy(name, f"runs/{name}", kind, manifest=Manifest(method="modpo", weights=weights) if weights else None)


def comparison(folder, rewards, objectives=None, samples=2, temperature=1.0, log_ratio=0.25):
    """A comparison in which policy `p` has `rewards[p]`: for every prompt a list of (helpful, cost) of each sample."""
    made = Comparison(folder)
    prompts = len(next(iter(rewards.values())))
    asked = [user(f"Question {prompt}?") for prompt in range(prompts)]
    made.agree(
        prompts={"count": prompts, "digest": fingerprint(asked)},
        sampling={"samples": samples, "max_new_tokens": 8, "temperature": temperature, "top_p": 1.0, "seed": 1},
    )
    for name, objective in (objectives or {"helpful": HELPFUL, "cost": COST}).items():
        made.add_objective(name, Objective.model_validate(objective))
    for name, each in rewards.items():
        kind = name if name in ("reference", "baseline") else "policy"
        made.add_policy(policy(name, kind, {"helpful": 0.5} if kind == "policy" else None))
        rows = [
            {
                "prompt_id": prompt,
                "sample": sample,
                "prompt": asked[prompt],
                "response": f"{name} says {prompt}.{sample}",
                "token_ids": [1] * (3 + sample),
                "finished": sample == 0,
                "logp": -1.0,
                "ref_logp": -1.0 - log_ratio,
                **dict(zip(made.objectives, values, strict=True)),
            }
            for prompt, of_prompt in enumerate(each)
            for sample, values in enumerate(of_prompt)
        ]
        made.append(name, rows)
    made.save_settings()
    return Comparison(folder)


@pytest.fixture
def four(tmp_path):
    """Means: a (3, 1), b (2, 0), c (1, 2), reference (2, 1)."""
    return comparison(
        tmp_path,
        {
            "a": [[(4, 2), (2, 0)], [(3, 1), (3, 1)]],
            "b": [[(2, 0), (2, 0)], [(2, 0), (2, 0)]],
            "c": [[(1, 2), (1, 2)], [(1, 2), (1, 2)]],
            "reference": [[(3, 1), (1, 1)], [(2, 1), (2, 1)]],
        },
    )


def test_means_directions_and_dominance(four):
    front = find_front(four)
    means = {s.policy.name: tuple(s.rewards[name].mean for name in ("helpful", "cost")) for s in front.results}
    assert means == {"a": (3, 1), "b": (2, 0), "c": (1, 2), "reference": (2, 1)}
    dominated = {s.policy.name: s.dominated_by for s in front.results}
    assert dominated == {"a": [], "b": [], "c": ["a", "b", "reference"], "reference": ["a", "b"]}
    assert [s.on_front for s in front.results] == [True, True, False, False]
    assert {s.tokens for s in front.results} == {3.5}
    assert {s.finished for s in front.results} == {0.5}
    only_cost = find_front(four, ["cost"])
    assert [s.policy.name for s in only_cost.results if s.on_front] == ["b"]


def test_policies_that_are_equal_do_not_dominate_each_other(tmp_path):
    same = [[(1, 1)], [(2, 0)]]
    front = find_front(comparison(tmp_path, {"a": same, "b": same}, samples=1))
    assert all(s.on_front for s in front.results)


def test_the_hypervolume_is_the_area_between_the_front_and_its_beginning(four):
    front = find_front(four, reference_point={"helpful": 0, "cost": 3})
    # a spans 3 x 2, b 2 x 3; they share 2 x 2.
    assert front.hypervolume == {"policies": 6 + 6 - 4, "all": 8}
    by_default = find_front(four)
    assert by_default.reference_point == {"helpful": 1, "cost": 2}  # c, the worst in both
    assert by_default.hypervolume["policies"] == 2 * 1 + 1 * 2 - 1 * 1


def test_win_rates_compare_every_two_responses_to_a_prompt(four):
    rates = {s.policy.name: s.win_rates for s in find_front(four).results}
    # Prompt 0: of (4, 2) against (3, 1): 4 wins twice, 2 loses and wins. Prompt 1: 3 against 2, always.
    assert rates["a"]["helpful"] == pytest.approx((3 / 4 + 1) / 2)
    assert rates["a"]["cost"] == pytest.approx(0.5)
    assert rates["b"]["cost"] == 1
    assert rates["c"] == {"helpful": pytest.approx((1 / 4 + 0) / 2), "cost": 0}
    assert rates["reference"] == {"helpful": 0.5, "cost": 0.5}


def test_divergence_is_the_mean_log_ratio(tmp_path):
    rewards = {"a": [[(1, 1)], [(2, 2)]]}
    (result,) = find_front(comparison(tmp_path / "a", rewards, samples=1)).results
    assert result.kl.mean == pytest.approx(0.25)
    drawn_otherwise = find_front(comparison(tmp_path / "b", rewards, samples=1, temperature=0.5))
    assert not drawn_otherwise.exact_sampling
    without = comparison(tmp_path / "c", rewards, samples=1)
    without.replace("a", [{k: v for k, v in row.items() if k != "ref_logp"} for row in without.responses("a")])
    assert find_front(without).results[0].kl is None


def test_a_single_policy_is_a_front(tmp_path):
    front = find_front(
        comparison(tmp_path, {"a": [[(1, 1)], [(3, 1)]]}, samples=1), reference_point={"helpful": 0, "cost": 4}
    )
    assert front.results[0].on_front
    assert front.results[0].win_rates is None
    assert front.hypervolume == {"policies": 2 * 3, "all": 2 * 3}


def test_hypervolume_with_ties_and_duplicates(tmp_path):
    rewards = {"a": [[(2, 1)]], "b": [[(2, 1)]], "c": [[(2, 0)]], "d": [[(1, 0)]]}
    front = find_front(comparison(tmp_path, rewards, samples=1), reference_point={"helpful": 0, "cost": 2})
    assert {s.policy.name: s.dominated_by for s in front.results} == {"a": ["c"], "b": ["c"], "c": [], "d": ["c"]}
    assert front.hypervolume["policies"] == 2 * 2


def test_three_objectives_have_a_volume(tmp_path):
    objectives = dict.fromkeys("xyz", HELPFUL)
    made = comparison(tmp_path, {"a": [[(2, 1, 1)]], "b": [[(1, 2, 1)]], "c": [[(1, 1, 2)]]}, objectives, samples=1)
    front = find_front(made, reference_point=dict.fromkeys("xyz", 0.0))
    assert front.hypervolume["policies"] == 3 * 2 - 3 * 1 + 1


@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_cover_the_truth_as_often_as_they_say(skewed):
    rng = np.random.default_rng(1)
    draws = rng.exponential(1, (400, 150)) if skewed else rng.normal(1, 2, (400, 150))
    covered = [low <= 1 <= high for _, low, high in map(estimate, draws)]
    # 95%, less two and a half standard errors, and what the percentile method is known to lack at this size.
    assert 0.91 <= np.mean(covered) <= 0.98


def test_intervals_are_as_wide_as_the_normal_ones():
    values = np.random.default_rng(0).normal(3, 2, 400)
    mean, low, high = estimate(values)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std(ddof=1) / 20, rel=0.1)
    assert estimate(values) == (mean, low, high)
    assert estimate([5.0, 5.0, 5.0]) == (5, 5, 5)
    alone = estimate([5.0])
    assert alone.mean == 5
    assert math.isnan(alone.low)


@pytest.fixture
def uneven(tmp_path):
    """Eight prompts with three responses each, unsorted in the files; only costs have ties."""
    rng = random.Random(5)
    means = {"a": (3, 5), "b": (2, 3), "c": (1, 7), "d": (2.5, 9), "baseline": (1.8, 1), "reference": (1.5, 0)}
    rewards = {
        name: [[(rng.gauss(good, 1) ** 3, rng.randrange(cost, cost + 4)) for _ in range(3)] for _ in range(8)]
        for name, (good, cost) in means.items()
    }
    made = comparison(tmp_path, rewards, samples=3)
    for name in rewards:
        rows = [
            {
                **row,
                "logp": rng.gauss(-9, 2),
                "ref_logp": rng.gauss(-12, 4),
                "token_ids": [1] * rng.randrange(1, 9),
                "finished": rng.random() < 0.7,
            }
            for row in made.responses(name)
        ]
        made.replace(name, rng.sample(rows, len(rows)))
    return made


def plain_means(rows, number):
    """The mean over the responses to each prompt."""
    return [math.fsum(number(row) for row in rows if row["prompt_id"] == prompt) / 3 for prompt in range(8)]


def plain_win_rate(rows, others, number):
    """Win rate over all pairs of responses to the same prompt; ties count half."""
    both = [
        (number(row), number(other)) for row, other in product(rows, others) if row["prompt_id"] == other["prompt_id"]
    ]
    return sum(1 if own > other else 0.5 if own == other else 0 for own, other in both) / len(both)


def plain_area(points, begin):
    """The hypervolume of points above `begin`, if higher is better on both axes."""
    area, top = 0.0, begin[1]
    for across, up in sorted(points, reverse=True):
        if across > begin[0] and up > top:
            area, top = area + (across - begin[0]) * (up - top), up
    return area


def resamples(count):
    """All resamples of `count` values: the drawn indices, and the number of orders that give them."""
    return [
        (drawn, math.factorial(count) // math.prod(map(math.factorial, Counter(drawn).values())))
        for drawn in combinations_with_replacement(range(count), count)
    ]


def tails(values, drawn_in_ways, low, high):
    """The fractions of all resamples of some values whose means are below `low` and above `high`."""
    means = [(sum(values[index] for index in drawn) / len(values), ways) for drawn, ways in drawn_in_ways]
    below = sum(ways for mean, ways in means if mean < low)
    above = sum(ways for mean, ways in means if mean > high)
    return below / len(values) ** len(values), above / len(values) ** len(values)


NUMBERS = {
    "helpful": lambda row: row["helpful"],
    "cost": lambda row: -row["cost"],
    "kl": lambda row: row["logp"] - row["ref_logp"],
}
"""More is better; the divergence is neither."""


def test_every_number_is_that_of_a_plain_computation(uneven):
    front = find_front(uneven, reference_point={"helpful": 1.0})
    rows = {policy.name: uneven.responses(policy.name) for policy in uneven.policies}
    points = {name: [sum(plain_means(own, NUMBERS[x])) / 8 for x in ("helpful", "cost")] for name, own in rows.items()}
    for result in front.results:
        name = result.policy.name
        assert result.rewards["helpful"].mean == pytest.approx(points[name][0])
        assert result.rewards["cost"].mean == pytest.approx(-points[name][1])
        assert result.kl.mean == pytest.approx(sum(plain_means(rows[name], NUMBERS["kl"])) / 8)
        assert result.win_rates == {
            x: pytest.approx(plain_win_rate(rows[name], rows["reference"], NUMBERS[x])) for x in ("helpful", "cost")
        }
        assert result.tokens == pytest.approx(sum(len(row["token_ids"]) for row in rows[name]) / 24)
        assert result.finished == pytest.approx(sum(row["finished"] for row in rows[name]) / 24)
        own = points[name]
        assert result.dominated_by == [
            other for other, (x, y) in points.items() if x >= own[0] and y >= own[1] and [x, y] != own
        ]
    assert 1 < sum(result.on_front for result in front.results) < len(front.results)
    worst = min(y for _, y in points.values())
    assert front.reference_point == {"helpful": 1.0, "cost": pytest.approx(-worst)}
    policies = [points[name] for name in "abcd"]
    assert front.hypervolume == {
        "policies": pytest.approx(plain_area(policies, (1.0, worst))),
        "all": pytest.approx(plain_area(points.values(), (1.0, worst))),
    }
    assert front.hypervolume["policies"] < front.hypervolume["all"]
    assert (front.prompts, front.samples) == (8, 3)


def test_intervals_leave_out_one_resample_in_forty_on_either_side(uneven):
    """Compares with all resamples of the prompts' means; the bootstrap draws some of them."""
    shares, drawn_in_ways = [], resamples(8)
    for result in find_front(uneven).results:
        rows = uneven.responses(result.policy.name)
        for name, interval in {**result.rewards, "kl": result.kl}.items():
            sign = -1 if name == "cost" else 1
            means = [sign * mean for mean in plain_means(rows, NUMBERS[name])]
            shares += tails(means, drawn_in_ways, interval.low, interval.high)
    assert np.mean(shares) == pytest.approx(0.025, abs=0.002)
    assert np.std(shares) < 0.006  # of 2000 resamples; of 200 it is 0.011


@pytest.mark.parametrize(
    ("names", "point", "message"),
    [
        (["cost", "helpful", "cost"], None, "the objective cost is named twice; name every objective once"),
        (
            [f"score{number}" for number in range(32)],
            None,
            "there are 32 objectives; compare 31 of them at most, with --objectives",
        ),
        (
            ["speed", "cost", "mass"],
            None,
            "speed, mass was not scored; scored: helpful, cost; see axolotl mopo score --help",
        ),
        (
            None,
            {"speed": 1, "mass": 2},
            "--reference-point: speed, mass is not one of the compared objectives: helpful, cost",
        ),
        (
            None,
            {"cost": math.inf},
            "--reference-point cost: it is inf; it must be a finite number, at most 1e+30 in magnitude",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(four, names, point, message):
    with pytest.raises(ConfigError) as refused:
        find_front(four, names, reference_point=point)
    assert str(refused.value) == message


def test_as_many_objectives_as_the_hypervolume_takes_are_compared(tmp_path):
    names = [f"score{number}" for number in range(31)]
    with pytest.raises(ConfigError, match="was not scored; scored: helpful, cost"):
        find_front(comparison(tmp_path, {"a": [[(1, 1)]]}, samples=1), names)


def test_the_sign_of_an_objective_says_what_is_better(four):
    front = find_front(four)
    assert (front.better("helpful"), front.better("cost")) == (1, -1)


def test_an_interval_is_that_of_2000_resamples_drawn_from_the_same_seed():
    values = [1.0, 2.0, 3.0, 5.0, 8.0, 13.0]
    expected = bootstrap((np.array(values),), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
    assert estimate(values)[1:] == (expected.low, expected.high)


def test_what_is_missing_is_named(four, tmp_path):
    with pytest.raises(ConfigError, match="speed was not scored; scored: helpful, cost"):
        find_front(four, ["speed"])
    rows = four.responses("b")
    four.replace("b", rows[:3])
    with pytest.raises(ConfigError, match="b has 3 of 4 responses; run axolotl mopo generate again"):
        find_front(four)
    four.replace("b", [{k: v for k, v in row.items() if k != "cost"} for row in rows])
    with pytest.raises(
        ConfigError,
        match="b has no scores of cost, which other policies have; run axolotl mopo score again with the same",
    ):
        find_front(four)
    assert find_front(four, ["helpful"])
    with (
        pytest.raises(ConfigError, match="holds no responses; generate them with axolotl mopo generate"),
        Comparison.existing(tmp_path / "nowhere"),
    ):
        pass
    four.settings = four.settings.model_copy(update={"objectives": {}})
    with pytest.raises(ConfigError, match="has no scores; compute them with axolotl mopo score"):
        find_front(four)


def test_the_table_says_what_decides(four):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(find_front(four)))
    text = "\n".join([console.export_text(), *notes(find_front(four))])
    for words in ("helpful ↑", "cost ↓", "no: a, b", "Hypervolume above (helpful 1, cost 2)", "2 prompts, 2 responses"):
        assert words in text
    assert "temperature" not in text


def test_two_objectives_fit_into_a_narrow_terminal(four):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(find_front(four)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("reference", "helpful", "cost ↓", "100%", "yes", "a, b"):
        assert words in text
    assert "…" not in text


def test_log_ratios_of_other_draws_are_not_called_an_estimate(tmp_path):
    front = find_front(comparison(tmp_path, {"a": [[(1, 1)], [(2, 2)]]}, samples=1, temperature=0))
    assert any("it is not an estimate of the policies' divergence" in line for line in notes(front))


def test_csv_and_json_hold_the_same_numbers(four):
    front = find_front(four)
    lines = list(csv.DictReader(io.StringIO(to_csv(front))))
    content = json.loads(to_json(front))
    assert [line["policy"] for line in lines] == ["a", "b", "c", "reference"]
    for line, entry in zip(lines, content["policies"], strict=True):
        assert float(line["helpful"]) == entry["rewards"]["helpful"]["mean"]
        assert float(line["cost_low"]) == entry["rewards"]["cost"]["low"]
        assert float(line["cost_win_rate"]) == entry["win_rates"]["cost"]
        assert (line["on_front"] == "True") is entry["on_front"]
    assert content["hypervolume"]["all"] == front.hypervolume["all"]


def test_every_cell_of_the_csv_is_a_number_of_the_front(uneven):
    front = find_front(uneven)
    lines = list(csv.DictReader(io.StringIO(to_csv(front))))
    for line, result in zip(lines, front.results, strict=True):
        expected = {"policy": result.policy.name, "kind": result.policy.kind, "weights": result.policy.label}
        for name in ("helpful", "cost"):
            mean, low, high = result.rewards[name]
            expected |= {name: mean, f"{name}_low": low, f"{name}_high": high}
            expected[f"{name}_win_rate"] = result.win_rates[name]
        expected |= {"kl": result.kl.mean, "kl_low": result.kl.low, "kl_high": result.kl.high}
        expected |= {"tokens": result.tokens, "finished": result.finished, "on_front": result.on_front}
        expected["dominated_by"] = " ".join(result.dominated_by)
        assert line == {name: str(value) for name, value in expected.items()}
        assert list(line) == list(expected)
    assert lines[0]["weights"] == "helpful 0.5"
    assert max(len(line["dominated_by"].split()) for line in lines) > 1


def test_json_and_page_hold_every_number_of_the_front(uneven):
    front = find_front(uneven)
    content = json.loads(to_json(front))
    shown = json.loads(re.search(r'id="content">(.*?)</script>', render(front, uneven, 5), re.DOTALL).group(1))
    assert content["objectives"] == [
        {"name": name, "lower_is_better": name == "cost", "begins_at": front.reference_point[name]}
        for name in ("helpful", "cost")
    ]
    assert (content["prompts"], content["samples"], content["exact_sampling"]) == (8, 3, True)
    for entry, in_page, result in zip(content["policies"], shown["policies"], front.results, strict=True):
        assert entry["rewards"] == {name: value._asdict() for name, value in result.rewards.items()}
        assert entry["kl"] == result.kl._asdict()
        assert entry["win_rates"] == result.win_rates
        assert (entry["tokens"], entry["finished"]) == (result.tokens, result.finished)
        assert (entry["on_front"], entry["dominated_by"]) == (result.on_front, result.dominated_by)
        assert (entry["name"], entry["kind"]) == (result.policy.name, result.policy.kind)
        assert in_page.pop("label") == result.policy.label
        responses = in_page.pop("responses")
        assert in_page == entry
        rows = uneven.responses(result.policy.name)[:15]
        assert [response for own in responses for response in own] == [
            {"text": row["response"], "finished": row["finished"], "scores": {x: row[x] for x in ("helpful", "cost")}}
            for row in rows
        ]
        assert [len(own) for own in responses] == [3] * 5
    assert shown["conversations"] == [user(f"Question {prompt}?") for prompt in range(5)]
    assert {key: shown[key] for key in content if key != "policies"} == {
        key: content[key] for key in content if key != "policies"
    }


def test_the_table_shows_means_half_widths_and_shares(uneven):
    front = find_front(uneven)
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(table(front))
    lines = console.export_text().splitlines()
    for result in front.results:
        (line,) = [line for line in lines if line.split()[:1] == [result.policy.name]]
        cells = []
        for name in ("helpful", "cost"):
            mean, low, high = result.rewards[name]
            cells += [f"{mean:.3g} ± {(high - low) / 2:.2g}", f"{100 * result.win_rates[name]:.0f}%"]
        cells += [f"{result.kl.mean:.3g}", f"{result.tokens:.0f}", f"{100 * result.finished:.0f}%"]
        cells.append("yes" if result.on_front else f"no: {', '.join(result.dominated_by)}")
        title = f"{result.policy.name}{' (baseline)' if result.policy.kind == 'baseline' else ''}"
        assert line.split() == [*title.split(), *" ".join(cells).split()]
    volumes = [f"{front.hypervolume[which]:.4g}" for which in ("policies", "all")]
    assert "{} for the policies, {} with baselines and reference.".format(*volumes) in notes(front)[1]
    assert volumes[0] != volumes[1]


def test_numbers_that_are_not_there_are_null(tmp_path):
    front = find_front(comparison(tmp_path, {"a": [[(1, 1)]]}, samples=1))
    (entry,) = json.loads(to_json(front))["policies"]
    assert entry["rewards"]["helpful"] == {"mean": 1, "low": None, "high": None}
    assert entry["win_rates"] is None


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_pictures_for_any_number_of_objectives(tmp_path, count):
    objectives = {f"goal{number}": HELPFUL if number else COST for number in range(count)}
    rng = np.random.default_rng(0)
    rewards = {name: rng.normal(size=(3, 2, count)).tolist() for name in ("a", "b", "baseline", "reference")}
    front = find_front(comparison(tmp_path, rewards, objectives))
    assert draw(front, "png").startswith(b"\x89PNG")
    assert len(draw(front, "svg")) > 5000


def test_better_is_to_the_right_and_up(four):
    from axolotl_mopo.evaluation.plots import _figure

    (axes,) = _figure(find_front(four)).axes
    assert not axes.xaxis.get_inverted()
    assert axes.yaxis.get_inverted()


def test_the_page_opens_without_a_network_and_shows_text_as_text(four):
    hostile = '</script><img src=x onerror="alert(1)"> & {{ 7 * 7 }}'
    four.replace("a", [{**row, "response": hostile} for row in four.responses("a")])
    page = render(find_front(four), four, prompts=1)
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:|//)", page)
    assert page.count("</script>") == 2
    content = json.loads(re.search(r'id="content">(.*?)</script>', page, re.DOTALL).group(1))
    assert content["policies"][0]["responses"][0][0]["text"] == hostile
    assert len(content["conversations"]) == 1
    assert "The responses to the first 1 prompts are shown." in page


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, page, folder):
    """The page in a real browser, with its console messages and network requests."""
    (folder / "front.html").write_text(page)
    view, seen = browser.new_page(), []
    for event in ("console", "pageerror", "request"):
        view.on(event, lambda what, event=event: seen.append((event, getattr(what, "url", str(what)))))
    view.goto((folder / "front.html").as_uri())
    return view, [entry for entry in seen if not entry[1].startswith("file:")]


def test_hovering_shows_values_and_a_click_the_responses(four, browser, tmp_path):
    view, seen = opened(browser, render(find_front(four), four, prompts=2), tmp_path)
    points = view.locator("#plane .point")
    assert points.count() == 4
    card = view.locator("#card")
    assert not card.is_visible()
    points.nth(0).hover()
    assert card.is_visible()
    assert card.inner_text().splitlines() == [
        "helpful 0.5",
        "helpful: 3 (3 to 3)",
        "cost: 1 (1 to 1)",
        "KL: 0.25 (0.25 to 0.25)",
    ]
    view.mouse.move(5, 5)
    assert not card.is_visible()
    points.nth(1).click()
    view.get_by_role("button", name="Next").click()
    shown_responses = view.locator("#responses").inner_text()
    for words in ("prompt 2 of 2", "Question 1?", "b says 1.0", "b says 1.1", "reference says 1.0"):
        assert words in shown_responses
    assert seen == []


def test_the_axes_of_three_objectives_are_chosen(browser, tmp_path):
    objectives = {"a": HELPFUL, "b": COST, "c": HELPFUL}
    made = comparison(
        tmp_path, {"p": [[(1, 2, 3)], [(2, 3, 4)]], "q": [[(0, 1, 9)], [(0, 2, 9)]]}, objectives, samples=1
    )
    view, seen = opened(browser, render(find_front(made), made, prompts=1), tmp_path)
    places = view.locator("#plane .point").first.get_attribute("cy")
    view.get_by_label("y axis").select_option("c")
    assert view.locator("#plane .point").first.get_attribute("cy") != places
    assert seen == []


def test_hostile_text_stays_text_in_a_browser(four, browser, tmp_path):
    hostile = '</script><img src=x onerror="alert(1)"><b>bold</b>'
    four.replace("a", [{**row, "response": hostile} for row in four.responses("a")])
    view, seen = opened(browser, render(find_front(four), four, prompts=1), tmp_path)
    assert hostile in view.locator("#responses").inner_text()
    assert view.locator("img, b").count() == 0
    assert seen == []


def test_lines_that_a_killed_process_left_are_cut_off(tmp_path):
    made = Comparison(tmp_path)
    row = {"prompt_id": 0, "sample": 0, "prompt": user("Why?"), "response": "two\u2028lines and é"}
    row |= {"token_ids": [1], "finished": True}
    made.append("a", [row])
    with (tmp_path / "responses" / "a.jsonl").open("ab") as file:
        file.write('{"prompt_id": 1, "sample": 0, "response": "é'.encode()[:-1])
    assert made.responses("a") == [row]
    made.append("a", [{**row, "prompt_id": 2}])
    assert [entry["prompt_id"] for entry in made.responses("a")] == [0, 2]


def test_a_column_is_computed_where_it_was_left(four):
    asked = []

    def compute(rows):
        asked.append([row["prompt_id"] for row in rows])
        if len(asked) == 2:
            raise RuntimeError("out of memory")
        return [float(row["prompt_id"]) for row in rows]

    with pytest.raises(RuntimeError):
        four.compute("a", "new", "source", 2, compute, "title")
    values = four.compute("a", "new", "source", 2, compute, "title")
    assert len(asked) == 3  # the first batch was not computed again
    assert values == [0, 0, 1, 1]
    four.add_column("a", "new", values)
    assert [row["new"] for row in four.responses("a")] == values
    other = four.compute("a", "new", "another source", 4, lambda rows: [7.0] * len(rows), "title")
    assert other == [7.0] * 4


def test_numbers_are_kept_for_one_policy_column_and_source(four):
    """A stopped computation keeps its numbers while others in the same folder continue."""
    asked = []

    def stopping(rows):
        if asked:
            raise RuntimeError("out of memory")
        asked.append([(row["prompt_id"], row["sample"]) for row in rows])
        return [7.0] * len(rows)

    def numbers(rows):
        return [10.0 * row["prompt_id"] + row["sample"] for row in rows]

    with pytest.raises(RuntimeError):
        four.compute("a", "new", "source", 2, stopping, "title")
    assert asked == [[(0, 1), (1, 1)]]  # the longest first
    for place in (("b", "new", "source"), ("a", "other", "source"), ("a", "new", "another")):
        assert four.compute(*place, 3, numbers, "title") == [0, 1, 10, 11]
    assert four.compute("a", "new", "source", 3, numbers, "title") == [0, 7, 10, 7]
    four.add_column("a", "new", [1.0, 2.0, 3.0, 4.0], ["source"])
    assert four.compute("a", "new", "source", 3, numbers, "title") == [0, 1, 10, 11]  # the partial results are gone
    assert four.compute("a", "new", "another", 3, lambda rows: [8.0] * len(rows), "title") == [0, 1, 10, 11]


def test_another_sampling_or_another_run_of_a_name_is_refused(four, tmp_path):
    with pytest.raises(ConfigError, match=r"made with prompts .*count=2.* not .*count=9.*choose another --out"):
        four.agree(prompts={"count": 9, "digest": 2})
    four.add_policy(policy("a", weights={"helpful": 0.5}))
    with pytest.raises(ConfigError, match="under the name a, and runs/a is another run or was trained again"):
        four.add_policy(policy("a", weights={"helpful": 0.6}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("brief=length", {"source": "length", "unit": "tokens"}),
        ("brief=length:words", {"source": "length", "unit": "words"}),
        ("nice={source: length, unit: characters}", {"source": "length", "unit": "characters"}),
        ("code=callable:textwrap:shorten", {"source": "callable", "function": "textwrap:shorten", "batch_size": 64}),
    ],
)
def test_scorers_are_the_margins_sources(text, expected):
    name, margin = parse_scorer(text)
    assert name == text.partition("=")[0]
    assert expected.items() <= margin.model_dump().items()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("brief", "write NAME=SOURCE"),
        ("logp=length", "the objective logp needs the column logp, which is taken; choose another name"),
        ("a b=length", "the name 'a b' is not allowed; use letters, digits"),
        ("x=magic", "`--scorer x` needs a `source`, one of column, length, adapter, reward_model, callable"),
        ("x=length:feet", "`--scorer x.unit`"),
        ("x=length:feet", "Meaning: Unit of the length"),
        ("x={source: length, units: words}", "`--scorer x.units` is not a known key; did you mean `unit`?"),
        ("x=column", "have no column of scores; use another source"),
        ("x=column:helpful", "have no column of scores; use another source"),
        ("x={source: length, scale: 2}", "scale apply to training only"),
        ("x={source: [}", "is not a YAML mapping"),
        ("x=callable:nosuch:f", "`--scorer x.function`: the function nosuch:f cannot be imported"),
        ("x=adapter:no/where", "`--scorer x.path`: no/where is not the folder of a LoRA adapter"),
    ],
)
def test_a_scorer_that_cannot_work_is_refused(text, words):
    with pytest.raises(ConfigError) as caught:
        parse_scorer(text)
    assert words in str(caught.value)
