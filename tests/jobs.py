"""Work for a batcher that says what is done with it, and time that passes when told to."""

import threading


class Clock:
    """Seconds that only pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def blocked(started, gate, tokens=10):
    """One step that waits for the gate."""

    def steps():
        started.set()
        gate.wait(10)
        return tokens
        yield

    return steps()


def counted(log, name, num_steps, tokens=10):
    for step in range(num_steps):
        if step:
            yield tokens
        log.append((name, step))
    return name


class Portions:
    """Work of some portions of one token each."""

    def __init__(self, name, portions):
        self.name, self.portions = name, portions

    @property
    def is_waiting(self):
        return self.portions > 0

    def join(self, launch, member):
        taken = min(self.portions, launch["room"])
        launch["room"] -= taken
        self.portions -= taken
        if taken:
            launch["members"].append((member, self.name, taken))
        return taken

    def result(self):
        return self.name


class Launcher:
    """Launches of four portions; one with "bad" in it fails, and none runs while the gate is closed."""

    def __init__(self):
        self.launches, self.seconds = [], []
        self.gate, self.started = threading.Event(), threading.Event()

    def open(self):
        return {"room": 4, "members": []}

    def run(self, launch, members):
        self.started.set()
        self.gate.wait(10)
        assert [member for member, _, _ in launch["members"]] == list(range(len(members)))
        self.launches.append([(name, taken) for _, name, taken in launch["members"]])
        if members[0].name == "broken":
            raise RuntimeError("device lost")
        return {i: RuntimeError("bad input") for i, work in enumerate(members) if work.name == "bad"}

    def count(self, launch, seconds):
        self.seconds.append(seconds)
