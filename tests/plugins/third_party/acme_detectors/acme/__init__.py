"""A method package of the usual shape: one class, exported by the package."""

from .lightning_model import AcmeModel

__all__ = ["AcmeModel"]
