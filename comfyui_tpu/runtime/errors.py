"""Errors a user may see. Each message says what was expected, what came, and what to do."""


class TPUError(Exception):
    """Base of every error this library raises on purpose."""


class InvalidInput(TPUError, ValueError):
    """A value given by the user cannot be used; nothing was loaded or lost."""


class ModelNotFound(TPUError, LookupError):
    """No checkpoint answers to the given ``model_id``."""


class CheckpointError(TPUError):
    """A checkpoint on disk is incomplete, damaged or of another architecture than asked for."""


class PlanError(TPUError, ValueError):
    """A sharding plan does not fit the model or the devices."""


class OutOfDeviceMemory(TPUError, MemoryError):
    """The devices' memory (HBM) is too small for what was asked, also after evicting everything evictable."""


class NumericsError(TPUError, ArithmeticError):
    """A stage produced NaN or infinity. It is reported, never masked."""
