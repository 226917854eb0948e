import json

import pytest


@pytest.fixture
def evaluate(run, filled):
    """Evaluates the tiny cohort against itself, for copies."""

    def invoke(*more):
        return run("evaluate", filled, "--out", "out", "--generator", "tiny", "--only",
                   "memorisation", *more)  # fmt: skip

    return invoke


def test_a_report_is_written_and_figures_are_shown(evaluate, filled, tmp_path):
    done = evaluate("--segmenter", "phantom", "--only", "conditioning")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "out" / "report.html").exists()
    assert "ventricles.failed" in done.stdout
    assert "not measured: memorisation: needs what the generator learned from" in done.stderr
    assert "conditioning took" in done.stderr
    assert "s a synthetic volume" in done.stderr
    assert "report.html" in done.stderr


def test_results_as_json(evaluate):
    done = evaluate("--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["sets"]["synthetic"]["volumes"] == 12


def test_a_condition_that_is_not_met_has_an_exit_code_of_its_own(evaluate):
    options = ("--segmenter", "phantom", "--only", "conditioning")
    assert evaluate(*options, "--require", "ventricles.failed<=12").exit_code == 0
    done = evaluate(*options, "--require", "ventricles.failed<1")
    assert done.exit_code == 3
    assert "not met: ventricles.failed is 12, required < 1" in done.stderr


def test_conditions_are_read_before_anything_is_measured(evaluate, tmp_path):
    done = evaluate("--require", "ventricles")
    assert done.exit_code == 2
    assert "no condition" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--only", "fid"), "unknown part 'fid'"),
        (("--segmenter", "freesurfer"), "unknown segmenter 'freesurfer'"),
        (("--segmenter", "phantom", "--labels", "."), "not both"),
        (("--labels", "nowhere"), "there is no folder nowhere; --labels takes one"),
        (("--features", "inception"), "unknown feature network 'inception'"),
        (("--features", "med3d-resnet50"), "weights pull med3d-resnet50"),
        (("--regressor", "nowhere"), "nowhere"),
        (("--measure", "psnr"), "unknown similarity 'psnr'"),
        (("--real", "nowhere"), "nowhere"),
        (("--real", "."), "."),
        (("--utility", "ldm-epsilon"), "kind regression"),
        (("--labels", ".", "--sweeps", "2"), "no --sweeps"),
        (("--require", "fdd<1"), "did you mean 'fd'"),
        (("--require", "ms-ssim<1"), "ms-ssim is a figure of diversity; add --only diversity"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(evaluate, options, words):
    done = evaluate(*options)
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
