import contextlib
import os
import pickle
import stat
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client

import pytest
import torch
from sampled import Noise, Picky

from generation.generator import Generator
from synthbrain.errors import CovariateError, GeneratorError, UsageError
from synthbrain.sampling import SharedGenerator, protocol, serve, status
from synthbrain.sampling.maker import Maker
from synthbrain.sampling.service import Service
from synthbrain.sampling.spec import Spec
from synthbrain.testing import check_generator, tiny_manifest


@pytest.fixture
def rows():
    return tiny_manifest(8).table


@pytest.fixture
def serving():
    """Serves a spec from a thread of this process; at the end it must have left nothing."""
    with contextlib.ExitStack() as stack:

        @contextlib.contextmanager
        def run(shared):
            folder = shared.spec.folder()
            service = Service(folder, Maker(shared.spec, shared.limits.batch), idle=0.0)
            thread = threading.Thread(target=lambda: ignoring(service.run))
            thread.start()
            keeper = until(lambda: connection(folder))
            try:
                yield shared
            finally:
                shared.close()
                keeper.close()
                thread.join(20)
                assert not thread.is_alive()
                assert list(folder.parent.iterdir()) == []

        yield lambda name, **options: stack.enter_context(run(SharedGenerator(name, **options)))


def ignoring(run):
    with contextlib.suppress(GeneratorError):
        run()


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def connection(folder):
    try:
        return protocol.dial(folder)
    except protocol.NOT_THERE:
        return None


# A generator like any other


def test_it_keeps_the_contract_of_the_generator_it_stands_for(serving):
    shared = serving("sampled:Noise")
    check_generator(shared)
    assert isinstance(shared, Generator)
    for promise in ("name", "digest", "honours", "shape", "batch_size", "seconds_per_volume"):
        assert getattr(shared, promise) == getattr(Noise(), promise)


def test_its_volumes_are_those_of_the_generator(serving, rows):
    shared = serving("sampled:Noise")
    assert torch.equal(shared.sample(rows), Noise().sample(rows))
    assert shared.sample(rows[:0]).shape == (0, 1, *Noise.shape)


def test_it_reaches_workers_with_its_facts_and_without_connections(serving, rows):
    shared = serving("sampled:Noise")
    copy = pickle.loads(pickle.dumps(shared))
    assert pickle.loads(pickle.dumps(shared.facts)) == shared.facts
    facts = copy.facts
    shared.sample(rows)
    copy = pickle.loads(pickle.dumps(shared))
    assert copy._free == []
    assert copy.facts == facts == shared.facts
    assert torch.equal(copy.sample(rows), shared.sample(rows))
    copy.close()


def test_threads_ask_at_the_same_time_and_rows_in_flight_are_made_once(serving, rows, tmp_path):
    shared = serving("sampled:Noise", log=str(tmp_path / "log"), seconds=0.3, batch_size=8)
    expected, got = Noise().sample(rows), []
    threads = [threading.Thread(target=lambda: got.append(shared.sample(rows))) for _ in range(4)]
    shared.facts  # noqa: B018
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    assert all(torch.equal(volumes, expected) for volumes in got)
    assert status(shared.spec.folder())["made"] == 8
    got[0].zero_()  # nobody else's
    assert torch.equal(got[1], expected)


def test_seeds_and_covariates_arrive_to_the_last_bit(serving, rows):
    shared = serving("sampled:Noise")
    rows = rows.assign(seed=[2**64 - 1, 2**63, 0, 1, 2, 3, 4, 5], age=rows["age"] * (1 / 3) - 2)
    assert torch.equal(shared.sample(rows), Noise().sample(rows))


# What goes wrong


def test_what_the_generator_says_reaches_the_caller_in_one_line(serving, rows):
    bad = int(rows["seed"].iloc[3])
    shared = serving("sampled:Picky", refused=[bad])
    with pytest.raises(GeneratorError, match=f"ValueError: seed {bad} is unlucky") as caught:
        shared.sample(rows)
    assert "\n" not in str(caught.value)
    assert torch.equal(shared.sample(rows[4:]), Picky().sample(rows[4:]))


def test_the_generators_own_errors_keep_their_class(serving, rows):
    shared = serving("sampled:Noise")
    with pytest.raises(CovariateError, match="must be finite"):
        shared.sample(rows.assign(age=float("nan")))
    with pytest.raises(CovariateError, match=r"lack the column\(s\) sex"):
        shared.sample(rows.drop(columns="sex"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sampled:unloadable", "FileNotFoundError: no weights here"),
        ("sampled:absent", "has no attribute 'absent'"),
        ("no_such_module:x", "No module named 'no_such_module'"),
        ("no-such-name", "unknown generator 'no-such-name'"),
    ],
)
def test_a_generator_that_cannot_be_loaded_says_why_and_the_service_ends(serving, name, said):
    with pytest.raises(GeneratorError, match=said):
        serving(name).facts  # noqa: B018


def test_weights_that_changed_meanwhile_are_noticed(serving, rows):
    shared = serving("sampled:Noise")
    other = pickle.loads(pickle.dumps(shared))
    told = shared.facts.to_message() | {"digest": "ffff0000ffff0000"}
    other._facts = protocol.Facts.from_message(told)
    with pytest.raises(GeneratorError, match="ffff0000 before, 00112233 now"):
        other.sample(rows)
    other.close()


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((Noise(),), {}, "by name or as 'package.module:callable'; found Noise"),
        (("phantom",), {"batch": 0}, "batch must be at least 1"),
        (("phantom",), {"idle": -1}, "idle must be at least 0"),
        (("phantom",), {"steps": Noise()}, "must be numbers, text"),
    ],
)
def test_arguments_that_make_no_sense(arguments, options, said):
    with pytest.raises(UsageError, match=said):
        SharedGenerator(*arguments, **options)


# Who may come in


def test_a_wrong_key_is_refused_and_others_go_on(serving, rows):
    shared = serving("sampled:Noise")
    with protocol.address(shared.spec.folder()) as name:
        with pytest.raises(AuthenticationError):
            Client(name, "AF_UNIX", authkey=b"guessed")
        with Client(name, "AF_UNIX") as stranger:  # answers the challenge with a pickle
            stranger.recv_bytes()
            stranger.send({"do": "status"})
            assert stranger.recv_bytes() == b"#FAILURE#"
    assert torch.equal(shared.sample(rows), Noise().sample(rows))


def test_a_silent_peer_holds_nobody_up(serving, rows):
    shared = serving("sampled:Noise")
    with protocol.address(shared.spec.folder()) as name, Client(name, "AF_UNIX"):
        assert torch.equal(shared.sample(rows), Noise().sample(rows))


def test_only_its_user_can_enter_the_folder_or_read_the_key(serving):
    folder = serving("sampled:Noise").spec.folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600


def test_a_home_far_too_deep_for_a_sockets_address_is_no_matter(
    serving, rows, tmp_path, monkeypatch
):
    monkeypatch.setenv("SYNTHBRAIN_HOME", str(tmp_path / ("deep" * 40)))
    assert torch.equal(serving("sampled:Noise").sample(rows), Noise().sample(rows))


# What it is doing


def test_status_tells_what_the_service_is_doing(serving, rows):
    shared = serving("sampled:Noise", batch=3)
    shared.sample(rows)
    told = status(shared.spec.folder())
    assert told == {
        "pid": os.getpid(), "generator": "noise-00112233", "device": None, "batch": 3,
        "queued": 0, "made": 8, "clients": 2,
    }  # fmt: skip


def test_status_without_a_service(tmp_path):
    with pytest.raises(UsageError, match="no sampling service answers"):
        status(tmp_path)


def test_a_second_service_of_the_same_generator_is_refused(serving):
    serving("sampled:Noise")
    with pytest.raises(UsageError, match="runs already"):
        serve("sampled:Noise")


def test_name_device_and_options_choose_the_folder(monkeypatch):
    specs = [Spec("a"), Spec("b"), Spec("a", "cpu"), Spec("a", "cuda:1"), Spec("a", None, {"n": 1})]
    folders = {spec.folder() for spec in specs}
    assert len(folders) == len(specs)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert Spec("a", "cpu").folder() in folders
    assert Spec("a", "cuda:1").folder() not in folders
