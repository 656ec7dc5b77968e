"""How many random operations the state machines have done."""


class OperationCount:
    def __init__(self) -> None:
        self.total = 0

    def count(self) -> None:
        self.total += 1


operations = OperationCount()
