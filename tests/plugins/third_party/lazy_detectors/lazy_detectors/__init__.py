"""The package is whole at once; its class is not."""


def __getattr__(name):
    if name == "Lazy":
        from .lightning_model import Lazy

        return Lazy
    raise AttributeError(name)
