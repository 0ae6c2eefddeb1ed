"""The ``trio-ray`` command."""


def run() -> None:
    """Entry point of the ``trio-ray`` script."""
