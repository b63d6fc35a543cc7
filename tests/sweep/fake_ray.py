"""What a sweep uses of Ray, with tasks that run in this process, the last one first."""

import os
import pickle
import sys
from types import SimpleNamespace

from anomalib_pack import on_node


class NodeDiedError(Exception):
    """Stands for any error of Ray."""


class Task:
    """A function that waits for its turn."""

    def __init__(self, function, given) -> None:
        self.run = lambda: function(*given)


class FakeRay:
    """A cluster of one node, with which the first result is lost, if it is told so."""

    exceptions = SimpleNamespace(RayError=NodeDiedError)

    def __init__(self, loses_first: bool = False) -> None:
        self.loses_first = loses_first
        self.asked = []

    def init(self, address):
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"

    def shutdown(self):
        self.asked.append("shutdown")

    def nodes(self):
        return [{"Alive": True, "NodeManagerHostname": "a", "Resources": {"CPU": 2.0, "memory": 1e9}}]

    def remote(self, function):
        def options(**resources):
            self.asked.append(resources)
            return SimpleNamespace(remote=lambda *given: Task(function, given))

        return SimpleNamespace(options=options)

    def wait(self, tasks, num_returns):
        return tasks[-num_returns:], tasks[:-num_returns]

    def get(self, task):
        if self.loses_first:
            self.loses_first = False
            raise NodeDiedError("the node\ndied too often")
        return task.run()


def use(monkeypatch, ray: FakeRay) -> FakeRay:
    """Have sweeps use it."""

    def run(_open, parcel, folder):
        function, argument = pickle.loads(parcel.job)
        return function(argument, folder)

    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(on_node, "in_own_process", run)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setenv(on_node.THREADS, "1")
    return ray
