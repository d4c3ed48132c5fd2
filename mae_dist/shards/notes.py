"""What an input holds and shards do not: said by kind, with a count and the first of each, never passed over."""

from collections.abc import Iterator, Mapping


class Notes(dict[str, tuple[int, str]]):
    """How often, and the first example, by kind; as JSON, an object of lists."""

    def add(self, kind: str, example: str, count: int = 1) -> None:
        times, first = self.get(kind, (0, example))
        self[kind] = (times + count, first)

    def update_from(self, others: Mapping[str, tuple[int, str]]) -> None:
        for kind, (count, example) in others.items():
            self.add(kind, example, count)

    def lines(self) -> Iterator[str]:
        """For people, a line a kind."""
        for kind, (count, example) in self.items():
            yield f"{count} {kind}, such as {example}"
