"""What a client was given on each of its connections to one service, so that it can say when the slots of a lost one are settled.

Connections are counted by epochs of our own: the numbers a service gives them begin anew when it does.
"""

from __future__ import annotations


class Tenures:
    """Loads and stores with slots that their user has not given back yet, by epoch. Not thread-safe."""

    def __init__(self) -> None:
        self.epoch = 0
        """The latest connection's."""
        self._numbers: dict[int, int] = {}
        self._held: dict[int, int] = {}

    def begin(self, connection: int) -> None:
        """A new connection, which the service knows by this number."""
        self.epoch += 1
        self._numbers[self.epoch] = connection
        self._held[self.epoch] = 0

    def given(self) -> None:
        """Slots came on the latest connection."""
        self._held[self.epoch] += 1

    def given_back(self, epoch: int) -> None:
        """Their user is done with some. Nothing, if they are another service's."""
        if epoch in self._held:
            self._held[epoch] -= 1

    @property
    def holding(self) -> bool:
        """Whether slots of the latest connection are in use."""
        return self._held.get(self.epoch, 0) > 0

    def take_settled(self) -> list[int]:
        """The service's numbers of earlier connections of which no slot is in use; each is named once."""
        settled = [epoch for epoch, held in self._held.items() if held <= 0 and epoch != self.epoch]
        for epoch in settled:
            del self._held[epoch]
        return [self._numbers.pop(epoch) for epoch in settled]

    def forget(self) -> None:
        """Another service: it knows nothing of those connections."""
        self._numbers.clear()
        self._held.clear()
