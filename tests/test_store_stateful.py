"""Any history of writes, damage and leftovers, against a model that is two dictionaries."""

import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from synthbrain import claims
from synthbrain.errors import DamagedShardError, MissingVolumeError
from synthbrain.header import Geometry
from synthbrain.store import Store

GEOMETRY = Geometry(shape=(4, 6, 4), chunks=(2, 3, 4))
POSITIONS = st.sampled_from([0, 1, 999, 1000, 1001, 4321])
FRACTIONS = st.floats(0, 1, exclude_max=True)
DEAD_PID = 2**22 + 1  # beyond the kernel's highest


def values(seed):
    return np.random.default_rng(seed).integers(0, 256, GEOMETRY.shape, dtype=np.uint8)


class StoreHistory(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.store = Store(self.root / "volumes", GEOMETRY)
        self.volumes = {}
        """The volume last written at each position whose file is there."""
        self.footer_lost, self.body_lost = set(), set()

    def teardown(self):
        shutil.rmtree(self.root)

    def judge(self, position):
        """Compare a shard with what was written."""
        found = self.store.path(position).read_bytes()
        sound = self.store.layout.encode(self.volumes[position])
        size = self.store.layout.footer_size
        self.footer_lost.discard(position)
        self.body_lost.discard(position)
        if len(found) != len(sound) or found[-size:] != sound[-size:]:
            self.footer_lost.add(position)
        elif found != sound:
            self.body_lost.add(position)

    def forget(self, position):
        del self.volumes[position]
        self.footer_lost.discard(position)
        self.body_lost.discard(position)

    @property
    def present(self):
        return set(self.volumes) - self.footer_lost

    @rule(position=POSITIONS, seed=st.integers(0, 99))
    def write(self, position, seed):
        wrote = self.store.write(position, values(seed))
        assert wrote == (position not in self.present)
        if wrote:
            self.volumes[position] = values(seed)
            self.footer_lost.discard(position)

    @rule(position=POSITIONS)
    def read(self, position):
        if position not in self.volumes:
            with pytest.raises(MissingVolumeError):
                self.store.read(position)
        elif position in self.footer_lost | self.body_lost:
            with pytest.raises(DamagedShardError):
                self.store.read(position)
        else:
            assert np.array_equal(self.store.read(position), self.volumes[position])

    @rule(position=POSITIONS, where=FRACTIONS, bit=st.integers(0, 7))
    def flip_a_bit(self, position, where, bit):
        if position in self.volumes:
            path = self.store.path(position)
            data = bytearray(path.read_bytes())
            if data:
                data[int(where * len(data))] ^= 1 << bit
                path.write_bytes(data)
                self.judge(position)

    @rule(position=POSITIONS, where=FRACTIONS)
    def truncate(self, position, where):
        if position in self.volumes:
            path = self.store.path(position)
            path.write_bytes(path.read_bytes()[: int(where * path.stat().st_size)])
            self.judge(position)

    @rule(position=POSITIONS)
    def append(self, position):
        if position in self.volumes:
            with self.store.path(position).open("ab") as file:
                file.write(b"garbage")
            self.judge(position)

    @rule(position=POSITIONS)
    def delete(self, position):
        if position in self.volumes:
            self.store.path(position).unlink()
            self.forget(position)

    @rule(position=POSITIONS)
    def quarantine(self, position):
        data = self.store.path(position).read_bytes() if position in self.volumes else None
        bad = self.store.quarantine(position)
        if data is not None:
            assert bad.read_bytes() == data
            self.forget(position)

    @rule(position=POSITIONS, where=FRACTIONS)
    def a_writer_is_killed(self, position, where):
        folder = self.store.path(position).parent
        folder.mkdir(parents=True, exist_ok=True)
        shard = self.store.layout.encode(values(0))
        leftover = folder / f".{self.store.path(position).name}.host.{DEAD_PID}.00.partial"
        leftover.write_bytes(shard[: int(where * len(shard))])
        claim = claims._path(self.store.path(position))
        claim.write_text(json.dumps({"host": "elsewhere", "pid": DEAD_PID}))
        os.utime(claim, (0, 0))

    @rule(position=POSITIONS)
    def claim(self, position):
        shard = self.store.path(position)
        free = claims.is_stale(shard)
        assert claims.claim(shard) == free
        assert not claims.is_stale(shard)
        claims.release(shard)
        assert claims.is_stale(shard)

    @rule()
    def sweep_all(self):
        self.store.sweep(older_than=-1)
        assert not list(self.store.root.glob("block-*/.*.partial"))
        claims.sweep(self.store.root)
        assert not list(self.store.root.glob("block-*/*.claim"))

    @rule()
    def reopen(self):
        self.store = Store(self.store.root, GEOMETRY)

    @rule()
    def move_to_another_process(self):
        self.store = pickle.loads(pickle.dumps(self.store))

    @rule()
    def delete_everything(self):
        shutil.rmtree(self.store.root, ignore_errors=True)
        for position in list(self.volumes):
            self.forget(position)

    @invariant()
    def presence_is_a_sound_footer(self):
        asked = [0, 1, 2, 999, 1000, 1001, 4321]
        assert self.store.stored(asked).tolist() == [p in self.present for p in asked]

    @invariant()
    def verify_names_exactly_the_damaged(self):
        found = dict(self.store.verify())
        assert set(found) == set(self.volumes)
        damaged = {position for position, damage in found.items() if damage is not None}
        assert damaged == self.footer_lost | self.body_lost


StoreHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestStoreHistory = StoreHistory.TestCase
