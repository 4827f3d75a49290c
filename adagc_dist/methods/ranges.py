"""Ranges of a baseline's numbers, told by their keys."""

__all__ = ["check_not_negative", "check_share"]


def check_not_negative(settings: object, *names: str) -> None:
    """Raises ValueError where one of these numbers is negative or not a number."""
    for name in names:
        value = getattr(settings, name)
        if not value >= 0:
            raise ValueError(f"method.kwargs.{name}={value} must not be negative")


def check_share(settings: object, *names: str) -> None:
    """Raises ValueError where one of these numbers lies outside [0, 1]."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value <= 1:
            raise ValueError(f"method.kwargs.{name}={value} must lie in [0, 1]")
