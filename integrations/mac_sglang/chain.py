"""What a ring snapshot is keyed by: digests of a request's tokens in its namespace, prefix by prefix."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

TOKEN_TYPE = "q"
"""Typecode of SGLang's token arrays, 64-bit integers."""
_DIGEST_BYTES = 32


class TokenChain:
    """Digests of the prefixes of one request's tokens, computed once and extended as the tokens grow.

    Equal digests mean equal tokens in an equal namespace (BLAKE2b, 256 bits): requests of different users can meet in
    one store, so a hash that somebody could make collide would be no key. About 1 ms per 128K tokens, once.

    Parameters
    ----------
    namespace : sequence of str or None
        What besides the tokens decides the keys and values: extra key, cache salt, LoRA id. The order matters.
    tokens : sequence of int
        Tokens known so far. SGLang's own array is neither copied nor locked: it may grow between calls.
    """

    def __init__(self, namespace: Sequence[str | None], tokens: Sequence[int]) -> None:
        self.namespace = tuple(namespace)
        self._tokens = _as_array(tokens)
        self._hash, self._done = self._seed(), 0
        self._known: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Replace the tokens, usually by a longer list that begins with the old one."""
        tokens = _as_array(tokens)
        if tokens is self._tokens:
            return
        done = self._done
        if len(tokens) < done or not np.array_equal(_view(tokens, 0, done), _view(self._tokens, 0, done)):
            self._start()
        self._tokens = tokens

    def digests(self, lengths: Iterable[int]) -> dict[int, bytes]:
        """Digest of the first ``n`` tokens for every ``n`` of ascending ``lengths``; those beyond the end are left out.

        Going back behind what was hashed is free for lengths asked for before and else starts again.
        """
        wanted = [length for length in lengths if 0 <= length <= len(self)]
        if any(length < self._done and length not in self._known for length in wanted):
            self._start()
        for length in wanted:
            if length not in self._known:
                self._hash.update(_view(self._tokens, self._done, length).data)
                self._done = length
                self._known[length] = self._hash.digest()
        return {length: self._known[length] for length in wanted}

    def tokens(self, start: int, stop: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Copy of the tokens at positions ``[start, stop)``, int64."""
        return _view(self._tokens, start, min(stop, len(self))).copy()

    def _start(self) -> None:
        self._hash, self._done, self._known = self._seed(), 0, {}

    def _seed(self) -> hashlib.blake2b:
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"mac-ring")
        for part in self.namespace:
            text = b"" if part is None else part.encode("utf-8", "surrogatepass")
            # the length in front keeps ("ab", "c") apart from ("a", "bc"), and None from ""
            digest.update((-1 if part is None else len(text)).to_bytes(8, "little", signed=True) + text)
        return digest


def _as_array(tokens: Sequence[int]) -> array[int]:
    is_native = isinstance(tokens, array) and tokens.typecode == TOKEN_TYPE
    # `is_native` says that it is an array, which mypy cannot follow
    return tokens if is_native else array(TOKEN_TYPE, tokens)  # type: ignore[return-value]


def _view(tokens: array[int], start: int, stop: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    # lives for one expression only: an array that has a view cannot grow
    count = max(0, stop - start)
    if count == 0:
        return np.empty(0, np.int64)
    return np.frombuffer(tokens, np.int64, count, start * np.dtype(np.int64).itemsize)
