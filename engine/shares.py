"""Account for the part of the device that ranks are owed, whatever better ranks want of it.

A rank with a share earns credit while it has work ready: its share of every second that anybody's
work takes. What it is given for its credit is taken from it, and what was predicted too low is
taken later. Being served because nobody better is here uses credit up, but makes no debt; so
nothing is saved up and nothing paid back. A rank that is served now and then for nothing, in the
gaps of better ones, never comes to take a turn from them.
"""

from collections.abc import Container, Iterator, Mapping

# Within this time a rank gets its share, less one piece of work. Credit is limited to what the
# share earns in this time.
HORIZON_S = 60.0


class Shares:
    """The ranks with a share, best first, and their credit."""

    def __init__(self, shares: Mapping[int, float], patience_s: float = 0.0) -> None:
        """Start with no credit.

        patience_s: what a rank earns in so many seconds is kept back, so that work of a better rank
        that ends within them is never held up.

        Raises `ValueError` unless every share is above 0 and all together are below 1.
        """
        if not all(share > 0 for share in shares.values()) or not sum(shares.values()) < 1:
            raise ValueError(
                f"rank_shares {dict(shares)} are not parts of a whole "
                "that leave something to the other ranks"
            )
        self._shares = dict(sorted(shares.items()))
        self._patience_s = patience_s
        self._credits: dict[int, float] = {}  # of the ranks that have work ready
        self._kept: dict[int, float] = {}  # of the others

    def changed_to(self, shares: Mapping[int, float]) -> "Shares":
        """Return other shares, for which each rank with one before and after has its credit.

        Raises `ValueError` as the constructor does.
        """
        changed = Shares(shares, self._patience_s)
        changed._credits = {rank: had for rank, had in self._credits.items() if rank in shares}
        changed._kept = {rank: had for rank, had in self._kept.items() if rank in shares}
        return changed

    def seats(self, max_inflight: int) -> dict[int, int]:
        """Return the seats that each of these ranks keeps while it has images that want them.

        Without a seat its work would never be ready.
        """
        return {rank: max(1, round(share * max_inflight)) for rank, share in self._shares.items()}

    def note_ready(self, ranks: Container[int]) -> None:
        """Note which ranks have work ready: only these.

        The others keep at most what patience has earned, or they would have to wait for it again.
        """
        credits = self._kept | self._credits
        self._credits = {rank: credits.get(rank, 0.0) for rank in self._shares if rank in ranks}
        self._kept = {
            rank: min(credit, self._shares[rank] * self._patience_s)
            for rank, credit in credits.items()
            if rank not in self._credits
        }

    def spend(self, parts: Mapping[int, float], seconds: float, *, owed_to: int | None) -> None:
        """Note seconds of work (below 0: predicted too many).

        Each rank had its part, guests as well.

        owed_to: the rank whose turn it was by its credit.
        """
        for rank, credit in self._credits.items():
            share = self._shares[rank]
            part = parts.get(rank, 0.0)
            rest = credit + (share - part) * seconds
            if part > share and rank != owed_to:
                rest = min(credit, max(rest, 0.0))
            most = share * HORIZON_S
            self._credits[rank] = min(max(rest, -most), most)

    def in_credit(self) -> Iterator[int]:
        """Iterate over the ranks that may be owed a turn, best first."""
        return (rank for rank, credit in self._credits.items() if credit > 0)

    def covers(self, rank: int, seconds: float) -> bool:
        """Tell whether the rank is owed a piece of work of so many seconds.

        Work longer than its credit can ever cover is given once the credit is at its limit.
        """
        share = self._shares[rank]
        return self._credits[rank] >= min(seconds + share * self._patience_s, share * HORIZON_S)
