"""The key of a ring snapshot: equal exactly for equal tokens in an equal namespace."""

from __future__ import annotations

import time
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mac_sglang.chain import TokenChain

TOKENS = st.lists(st.integers(0, 2), max_size=12)
NAMESPACE = st.tuples(*[st.none() | st.sampled_from(["", "a", "b", "ab"])] * 3)


@given(NAMESPACE, TOKENS, NAMESPACE, TOKENS)
def test_digests_are_equal_exactly_where_namespace_and_tokens_are(one_space, one, other_space, other):
    first = TokenChain(one_space, one).digests(range(len(one) + 1))
    second = TokenChain(other_space, other).digests(range(len(other) + 1))
    for length in range(min(len(one), len(other)) + 1):
        equal = one_space == other_space and one[:length] == other[:length]
        assert (first[length] == second[length]) == equal
    digests = list(first.values())
    assert len(set(digests)) == len(digests)


@given(TOKENS, st.lists(st.tuples(TOKENS, st.sets(st.integers(0, 30))), max_size=5))
def test_a_chain_that_grows_or_turns_back_gives_what_a_new_one_gives(start, steps):
    tokens = array("q", start)
    chain = TokenChain(("key", None), tokens)
    for more, lengths in steps:
        if len(more) % 2:
            tokens = array("q", [*tokens[: len(more) // 2], *more])
        else:
            tokens.extend(more)
        chain.extend(tokens)
        wanted = sorted(lengths)
        got = chain.digests(wanted)
        assert got == TokenChain(("key", None), list(tokens)).digests(wanted)
        assert list(got) == [length for length in wanted if length <= len(tokens)]
        assert chain.tokens(1, 7).tolist() == tokens[1:7].tolist()


def test_tokens_may_grow_while_a_chain_exists():
    tokens = array("q", range(100))
    chain = TokenChain((), tokens)
    before = chain.digests([64, 100])
    copy = chain.tokens(0, 100)
    tokens.extend(range(28))
    tokens.append(7)
    assert len(chain) == 129 and copy.tolist() == list(range(100))
    assert chain.digests([64, 100, 129]) == {**before, 129: TokenChain((), list(tokens)).digests([129])[129]}


@pytest.mark.parametrize("tokens", [[1, 2, 3], (1, 2, 3), array("q", [1, 2, 3]), array("i", [1, 2, 3])])
def test_any_sequence_of_tokens_gives_the_same_digest(tokens):
    assert TokenChain((None,), tokens).digests([3]) == TokenChain((None,), [1, 2, 3]).digests([3])


def test_a_long_prompt_is_hashed_once_and_fast():
    tokens = array("q", range(131_072))
    chain = TokenChain((None,), tokens)
    begin = time.perf_counter()
    chain.digests(range(130_560, 131_073, 64))
    first = time.perf_counter() - begin
    tokens.extend(range(64))
    begin = time.perf_counter()
    chain.digests(range(130_560, 131_137, 64))
    again = time.perf_counter() - begin
    # a loop over tokens in Python takes more than 10 ms, the measured time is about 1 ms
    assert first < 0.1 and again < first
