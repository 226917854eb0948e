import json

import pytest
import trainers

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (32, 32, 32)


@pytest.fixture
def recipe(tmp_path):
    """A file of settings for three steps of a tiny network."""

    def write(kind, **changes):
        system = trainers.tiny("medforj" if kind == "pixel" else "ukb-ldm", shape=SHAPE)
        if kind != "pixel":
            system["latent_shape"] = [3, 4, 4, 4]
        fields = trainers.BASE | {"kind": kind, "system": system, "steps": 3, "batch": 2} | changes
        (tmp_path / f"{kind}.json").write_text(json.dumps(fields))
        return f"{kind}.json"

    return write


def test_from_cohort_to_brains(run, cohort, recipe, tmp_path):
    data = ("--data", cohort, "--generator", "tiny")
    done = run("train", "autoencoder", *data, "--preset", recipe("autoencoder"), "--out", "ae")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "ae")
    assert "synthbrain train diffusion --data" in done.stderr
    line = ("train", "diffusion", *data, "--preset", recipe("diffusion"), "--out", "ldm")
    done = run(*line, "--autoencoder", "ae", "--until", 2)
    assert "ldm is at step 2 of 3" in done.stderr
    done = run(*line, "--autoencoder", "ae")
    assert "going on at step 2 of 3" in done.stderr
    assert "synthbrain weights add mine --autoencoder ae --diffusion ldm" in done.stderr
    done = run("weights", "add", "mine", "--autoencoder", "ae", "--diffusion", "ldm")
    assert done.exit_code == 0, done.stderr
    done = run("generate", "--generator", "mine", "--steps", 2, "--out", "brains")
    assert done.exit_code == 0, done.stderr
    assert len(list((tmp_path / "brains").rglob("*.nii.gz"))) == 1


def test_a_dry_run_shows_the_settings_and_writes_nothing(run, tmp_path):
    line = ("train", "autoencoder", "--data", "x", "--out", "run", "--dry-run", "--set", "batch=4")
    done = run(*line)
    assert done.exit_code == 0, done.stderr
    assert "13.77 M parameters" in done.stdout
    assert json.loads(run(*line, "--json").stdout)["batch"] == 4
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["diffusoin"], "KIND must be one of autoencoder, diffusion"),
        (["diffusion", "--preset", "ldm-epsilom"], "did you mean 'ldm-epsilon'"),
        (["diffusion", "--set", "bacth=3"], "no setting 'bacth' (did you mean 'batch'?)"),
        (["diffusion", "--preset", "medforj"], "trains 'pixel', not 'diffusion'"),
        (["pixel", "--preset", "absent.json"], "cannot read settings from absent.json"),
        (["pixel"], "no manifest 'absent'"),
        (["pixel", "--json"], "that --dry-run would"),
    ],
)
def test_mistakes_are_one_line(run, line, says):
    kind, *more = line
    done = run("train", kind, "--data", "absent", "--out", "run", *more)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
