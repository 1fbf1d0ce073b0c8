"""What lasts longer than a test, but not under mutmut, which runs for a mutant only the tests that reached it."""

import os


def mutating() -> bool:
    """Whether mutmut runs the tests."""
    return bool(os.environ.get("MUTANT_UNDER_TEST"))


def module(fixture_name: str, config: object) -> str:
    """The scope of a fixture that the code under test makes: a module."""
    return "function" if mutating() else "module"
