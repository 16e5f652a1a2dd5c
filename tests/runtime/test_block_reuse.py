"""Reuse of cache blocks, as a state machine: whatever comes and goes, a block holds what its holders think it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from npuq.runtime import SamplingParams
from npuq.runtime.block_manager import BlockManager
from npuq.runtime.scheduler import Scheduler
from npuq.runtime.sequence import Sequence
from npuq.runtime.step_budget import StepBudget

SIZE, BLOCKS = 4, 9
CONTEXT = SIZE * BLOCKS


def start(prompt: list[int], salt: bytes = b"", leader: Sequence | None = None, new: int = 100) -> Sequence:
    params = SamplingParams(max_new_tokens=new)
    return Sequence.start(prompt, params, CONTEXT, frozenset(), 0, None, salt, leader)


class Cache:
    """Scheduler and blocks as the engine has them. A slot holds what it was computed from: salt and tokens so far."""

    def __init__(self, *, reuse: bool = True):
        self.blocks = BlockManager(BLOCKS, SIZE, reuse=reuse)
        self.scheduler = Scheduler(self.blocks, 3, StepBudget(7))
        self.slots: dict[int, Any] = {}
        self.alive: list[Sequence] = []

    def submit(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)
        self.alive.append(sequence)

    def step(self, tokens: Iterator[int]) -> None:
        scheduled = self.scheduler.schedule()
        assert scheduled or not self.alive
        for work in scheduled:
            sequence = work.sequence
            for place in range(sequence.num_cached, sequence.num_cached + work.count):
                block = sequence.blocks[place // SIZE]
                self.slots[block * SIZE + place % SIZE] = (sequence.salt, tuple(sequence.tokens[: place + 1]))
        for work in scheduled:
            self.check(work.sequence, work.sequence.num_cached + work.count)
        samples = {work.sequence for work in scheduled if work.samples}
        for work in scheduled:
            work.sequence.num_cached += work.count
            self.blocks.commit(work.sequence)
        for sequence in samples:
            sequence.tokens.append(next(tokens))
            if len(sequence.tokens) >= sequence.max_tokens:
                self.end(sequence)

    def check(self, sequence: Sequence, length: int) -> None:
        """The blocks that the sequence attends to are its own."""
        for place in range(length):
            block = sequence.blocks[place // SIZE]
            assert self.slots[block * SIZE + place % SIZE] == (sequence.salt, tuple(sequence.tokens[: place + 1]))

    def end(self, sequence: Sequence) -> None:
        sequence.finish_reason = "stop"
        self.scheduler.finish(sequence)
        self.alive.remove(sequence)


class Machine(RuleBasedStateMachine):
    """Sequences over two tokens and two salts: prefixes meet all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=CONTEXT - 1),
        salt=st.sampled_from([b"", b"another"]),
        new=st.integers(1, 12),
    )
    def submit(self, prompt: list[int], salt: bytes, new: int) -> None:
        self.cache.submit(start(prompt, salt, new=new))

    @precondition(lambda self: self.cache.alive)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=6))
    def submit_a_second_turn(self, data: st.DataObject, more: list[int]) -> None:
        before = data.draw(st.sampled_from(self.cache.alive))
        self.cache.submit(start([*before.tokens, *more][: CONTEXT - 1], before.salt, new=5))

    @precondition(lambda self: self.cache.alive)
    @rule(data=st.data())
    def submit_a_choice(self, data: st.DataObject) -> None:
        first = data.draw(st.sampled_from(self.cache.alive))
        prompt = first.tokens[: first.num_prompt_tokens]
        self.cache.submit(start(prompt, first.salt, first, new=5))

    @precondition(lambda self: self.cache.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.cache.end(data.draw(st.sampled_from(self.cache.alive)))

    @rule(data=st.data(), count=st.integers(1, 6))
    def step(self, data: st.DataObject, count: int) -> None:
        tokens = iter(data.draw(st.lists(st.integers(0, 1), min_size=3 * count, max_size=3 * count)))
        for _ in range(count):
            self.cache.step(tokens)

    @rule()
    def ask_for_logits(self) -> None:
        """Blocks of a caller that neither finds nor leaves known blocks."""
        blocks = self.cache.blocks
        taken = blocks.allocate(min(2, blocks.num_free)) or []
        for slot in (block * SIZE + place for block in taken for place in range(SIZE)):
            self.cache.slots[slot] = "logits"
        blocks.release(taken)

    @rule()
    def doubt(self) -> None:
        self.cache.blocks.forget()

    @rule()
    def fail(self) -> None:
        for sequence in self.cache.alive:
            sequence.blocks, sequence.keys = [], []
        self.cache.alive.clear()
        self.cache.scheduler.reset()
        self.cache.blocks.reset()
        assert self.cache.blocks.num_known == 0

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        blocks = self.cache.blocks
        held = Counter(block for sequence in self.cache.alive for block in sequence.blocks)
        assert [held[block] for block in range(BLOCKS)] == blocks._holders
        assert set(blocks._free) == {block for block in range(BLOCKS) if not held[block]}
        assert all(len(set(sequence.blocks)) == len(sequence.blocks) for sequence in self.cache.alive)

    @invariant()
    def keys_and_blocks_belong_together(self) -> None:
        blocks = self.cache.blocks
        known = {key: block for block, key in enumerate(blocks._keys) if key is not None}
        assert known == blocks._blocks_by_key

    @invariant()
    def all_hold_what_they_think(self) -> None:
        for sequence in self.cache.alive:
            self.cache.check(sequence, sequence.num_cached)

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.cache.alive:
                break
            self.cache.step(iter([0, 1, 0]))
        assert not self.cache.alive
        assert self.cache.blocks.num_free == BLOCKS


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def zeros() -> Iterator[int]:
    while True:
        yield 0


def run(cache: Cache, sequence: Sequence) -> None:
    cache.submit(sequence)
    for _ in range(100):
        if sequence.finish_reason is not None:
            return
        cache.step(zeros())


def test_a_prompt_is_found_up_to_its_last_token() -> None:
    cache = Cache()
    run(cache, start([5] * 9, new=1))
    for length, reused in ((4, 0), (5, 4), (8, 4), (9, 8), (12, 8)):
        again = start([5] * length, new=1)
        run(cache, again)
        assert again.num_reused == reused
    other = start([5] * 8 + [6], b"another", new=1)
    run(cache, other)
    assert other.num_reused == 0


def test_a_second_turn_finds_the_answer_too() -> None:
    cache = Cache()
    first = start([5] * 6, new=7)
    run(cache, first)
    second = start([*first.tokens, 8, 8], new=1)
    run(cache, second)
    assert second.num_reused == 12


def test_beginnings_stay_longest() -> None:
    """Of blocks that nobody holds, those released first go first, and of a sequence its last."""
    blocks = BlockManager(4, SIZE)
    sequence = start(list(range(16)))
    sequence.blocks = blocks.allocate(4) or []
    sequence.num_cached = 16
    blocks.commit(sequence)
    blocks.release(sequence.blocks)
    for left in (3, 2, 1):
        assert blocks.allocate(1) is not None
        found, _ = blocks.match([*range(16), 0])
        assert found == sequence.blocks[:left]
        blocks.release(found)


def test_unknown_blocks_go_before_known_ones() -> None:
    blocks = BlockManager(4, SIZE)
    sequence = start([1] * 10)
    sequence.blocks = blocks.allocate(3) or []
    sequence.num_cached = 10
    blocks.commit(sequence)
    blocks.release(sequence.blocks)
    assert blocks.num_known == 2
    taken = blocks.allocate(2)
    assert taken is not None
    assert set(taken) == {3, sequence.blocks[2]}
    assert blocks.num_known == 2


def test_choices_wait_for_the_first() -> None:
    """They compute the last block alone."""
    cache = Cache()
    first = start([5] * 20, new=3)
    others = [start([5] * 20, leader=first, new=3) for _ in range(2)]
    for sequence in (first, *others):
        cache.submit(sequence)
    for _ in range(3):
        assert [sequence.num_reused for sequence in others] == [None, None]
        cache.step(zeros())
    for _ in range(20):
        cache.step(zeros())
    assert [sequence.num_reused for sequence in (first, *others)] == [0, 16, 16]
    assert not cache.alive


def test_without_reuse_nothing_is_found() -> None:
    cache = Cache(reuse=False)
    for _ in range(2):
        sequence = start([5] * 9, new=1)
        run(cache, sequence)
        assert sequence.num_reused == 0
    assert cache.blocks.num_known == 0


@pytest.mark.parametrize("salts", [(b"", b"a"), (b"a", b""), (b"ab", b"a"), (b"a", b"b")])
def test_salts_do_not_meet(salts: tuple[bytes, bytes]) -> None:
    cache = Cache()
    for salt in salts:
        sequence = start([5] * 9, salt, new=1)
        run(cache, sequence)
        assert sequence.num_reused == 0


def test_keys_differ_between_processes() -> None:
    """Each manager has a secret of its own, so nobody can compute keys."""
    sequences = []
    for _ in range(2):
        blocks = BlockManager(2, SIZE)
        sequence = start([5] * 5)
        sequence.blocks = blocks.allocate(2) or []
        sequence.num_cached = 5
        blocks.commit(sequence)
        sequences.append(sequence)
    assert sequences[0].keys != sequences[1].keys


def test_what_is_in_doubt_is_found_by_nobody() -> None:
    """Nor what a sequence computes from it afterwards, once its beginning is known again."""
    cache = Cache()
    going = start([5] * 9, new=9)
    cache.submit(going)
    for _ in range(3):
        cache.step(zeros())
    cache.blocks.forget()
    for _ in range(6):
        cache.step(zeros())
    assert going.num_cached > 12
    again = start([5] * 9, new=1)
    run(cache, again)
    assert again.num_reused == 0
    second = start([*going.tokens, 1], new=1)
    run(cache, second)
    assert second.num_reused == 8  # what `again` computed, and not what `going` did
