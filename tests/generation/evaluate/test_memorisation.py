import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generation.errors import EvaluationError
from generation.evaluate.memorisation import audit, combined


def points(count, seed, size=64):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def run(rate=0.0, *, training=300, held_out=300, synthetic=200, seed=0, **kwargs):
    """An audit of fresh points, a share of which are copies of the first training points."""
    real, others, made = (
        points(n, 3 * seed + k) for k, n in enumerate((training, held_out, synthetic))
    )
    copies = round(rate * synthetic)
    made[:copies] = real[torch.arange(copies) % training] + 0.2 * points(copies, 1000 + seed)
    return audit(real, made, others, space="points", controls=5, **kwargs)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.6, 1.0])
def test_copies_are_found_at_the_rate_they_were_planted(rate):
    found = run(rate)
    assert found.finding.above.share == pytest.approx(rate + (1 - rate) * 0.05, abs=0.05)
    assert found.finding.nearer.share == pytest.approx(rate + (1 - rate) / 2, abs=0.08)
    assert found.finding.p < (0.05 if rate == 0.1 else 1e-3)
    assert found.verdict == "copies found"
    assert found.finding.above_reversed.share < 0.12
    assert found.control.nearer.share == pytest.approx(0.5, abs=0.1)
    assert found.finding.distance_ratio < 1.02


@pytest.mark.parametrize(("training", "held_out"), [(300, 300), (900, 300), (150, 300)])
def test_fresh_samples_are_above_as_often_as_expected(training, held_out):
    audits = [run(training=training, held_out=held_out, seed=seed) for seed in range(10)]
    assert np.mean([a.finding.above.share for a in audits]) == pytest.approx(0.05, abs=0.025)
    assert np.mean([a.finding.nearer.share for a in audits]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([a.finding.distance_ratio for a in audits]) == pytest.approx(1, abs=0.01)
    assert sum(a.verdict != "no copy found" for a in audits) <= 2


def test_a_held_out_set_much_smaller_than_the_training_set_is_enough():
    assert run(0.2, training=2000, held_out=200).verdict == "copies found"
    flagged = sum(run(training=1000, held_out=100, seed=s).finding.p < 0.05 for s in range(20))
    assert flagged <= 3


@pytest.mark.parametrize(("training", "held_out"), [(400, 60), (60, 400)])
def test_sets_of_different_size_raise_no_false_alarm(training, held_out):
    sizes = {"training": training, "held_out": held_out, "synthetic": 1000, "most": 40}
    p = [run(seed=seed, **sizes).finding.p_nearer for seed in range(12)]
    assert sum(value < 0.05 for value in p) <= 2


@pytest.mark.parametrize(("training", "held_out"), [(30, 10), (100, 20), (30, 30)])
def test_few_volumes_in_many_dimensions_raise_no_false_alarm(training, held_out):
    def found(seed):
        sets = (points(n, 3 * seed + k, 300) for k, n in enumerate((training, 200, held_out)))
        return audit(*sets, space="points", controls=1)

    assert sum(found(seed).finding.p < 0.05 for seed in range(20)) <= 3


def test_the_centre_is_the_mean_of_the_real_samples_that_are_not_compared():
    real, made, others = (1e15 * points(n, seed).double() for seed, n in enumerate((7, 3, 5)))
    whole = torch.cat([real, others])

    def alike(first, second, *left_out):
        centre = whole[[i for i in range(12) if i not in left_out]].mean(0)
        return np.corrcoef(first - centre, second - centre)[0, 1]

    found = audit(real, made, others, space="points", controls=1, level=1.0)
    for sample, match, similarity in found.worst:
        each = [alike(made[sample], real[i], i) for i in range(7)]
        assert similarity == pytest.approx(max(each), abs=1e-5)
        assert match == int(np.argmax(each))
    between = [alike(real[i], others[j], i, 7 + j) for i in range(7) for j in range(5)]
    assert found.finding.threshold == pytest.approx(max(between), abs=1e-5)


def test_blur_is_no_copy():
    """Samples near the middle are more like everything: seen in both roles."""
    real, others = points(300, 0), points(300, 1)
    shared = points(1, 5) * 0.5
    blurred = shared + 0.3 * points(200, 2)
    found = audit(real + shared, blurred, others + shared, space="points", centre=False, controls=5)
    assert found.finding.above.share > 0.2
    assert found.finding.above_reversed.share > 0.2
    assert found.control.above.share > 0.2
    assert found.verdict == "no copy found"


def test_a_few_samples_that_are_close_to_everything_are_no_surprise():
    """A collapsed generator: all samples nearest to one real sample, by chance a training one."""
    real, others = points(100, 0), points(100, 1)
    made = points(1, 2) + 0.01 * points(100, 3)
    assert audit(real, made, others, space="points", controls=5).finding.p_nearer > 0.3


def test_eight_volumes_learned_by_heart_are_found():
    found = run(1.0, training=8, held_out=8, synthetic=16)
    assert found.verdict == "copies found"
    assert found.finding.above.count == 16
    assert run(0.0, training=8, held_out=8, synthetic=16).verdict == "no copy found"


def test_worst_pairs_are_the_copies():
    found = run(0.05, worst=10)
    assert [match.similarity for match in found.worst] == sorted(
        (match.similarity for match in found.worst), reverse=True
    )
    assert {(match.sample, match.match) for match in found.worst} == {(i, i) for i in range(10)}


def test_power_falls_with_the_dose():
    real = points(300, 0)
    planted = {
        str(dose): (real[:50] + dose * points(50, 9), range(50)) for dose in (0.1, 1.5, 20.0)
    }
    power = run(planted=planted).power
    found = [power[key].found.share for key in planted]
    assert found[0] == 1
    assert found[0] >= found[1] >= found[2]
    assert found[2] < 0.3
    assert power["0.1"].traced.share == 1
    assert power["20.0"].traced.share < 0.3


def test_the_statement_gives_control_and_power():
    real = points(300, 0)
    text = run(planted={"noise 0.1": (real[:20], range(20))}).statement()
    for part in ("no copy found in points", "member-only control", "power: 100 % at noise 0.1"):
        assert part in text
    assert "power: not measured" in run().statement()


@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_the_order_of_samples_makes_no_difference(seed):
    real, made, others = points(40, 1), points(30, 2), points(40, 3)
    made[:10] = real[:10] + 0.2 * points(10, 4)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    plain = audit(real, made, others, space="points", controls=1)
    mixed = audit(real[order], made[order[order < 30]], others[order], space="points", controls=1)
    one, two = plain.finding, mixed.finding
    assert one.threshold == pytest.approx(two.threshold, abs=1e-6)
    assert (one.above, one.above_reversed, one.nearer) == (
        two.above,
        two.above_reversed,
        two.nearer,
    )
    assert one.p_above == two.p_above


def test_scale_and_offset_of_vectors_make_no_difference():
    real, made, others = points(40, 1), points(30, 2), points(40, 3)
    plain = audit(real, made, others, space="points", controls=1).finding
    moved = audit(*(5 * v + 3 for v in (real, made, others)), space="points", controls=1).finding
    assert plain.threshold == pytest.approx(moved.threshold, abs=1e-6)
    assert plain.above == moved.above


def test_the_same_seed_gives_the_same_audit():
    assert run(0.1, seed=2) == run(0.1, seed=2)


def test_one_space_is_enough_and_the_number_of_spaces_counts():
    clean, copied = run(), run(0.5)
    assert combined([clean, clean])[0] == "no copy found"
    verdict, p = combined([clean, copied])
    assert (verdict, p) == ("copies found", 2 * copied.finding.p)
    doubtful = dataclasses.replace(copied, control=copied.finding)
    assert doubtful.verdict == combined([clean, doubtful])[0] == "inconclusive"
    weak = dataclasses.replace(
        clean, finding=dataclasses.replace(clean.finding, p_above=0.02, p_nearer=1.0)
    )
    assert weak.verdict == "copies found"
    assert combined([weak, clean])[0] == "no copy found"
    with pytest.raises(EvaluationError, match="no audits"):
        combined([])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"training": points(3, 0)}, "found training vectors of shape .3, 64."),
        ({"synthetic": points(9, 0, size=63)}, "found synthetic vectors of shape .9, 63."),
        ({"held_out": points(1, 0)}, "held-out"),
        ({"synthetic": torch.full((9, 64), torch.nan)}, "constant or not finite"),
        ({"synthetic": torch.ones(9, 64), "centre": False}, "constant or not finite"),
        ({"planted": {"x": (points(2, 0), [0, 9])}}, "index of one of 9"),
        ({"planted": {"x": (points(2, 0), [0])}}, "planted copies"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    given_ = {"training": points(9, 0), "synthetic": points(9, 1), "held_out": points(9, 2)}
    with pytest.raises(EvaluationError, match=says):
        audit(**{"space": "points", **given_, **change})
