"""The tests that claims name in data/claims.yaml: a small function for each kind of claim, by its name.

A test takes the evidence on a model (`claim_evidence.Evidence`) and the claim's arguments, and returns a `Finding`. It
reads records and nothing else. What a notebook's rule already says is taken from there.
"""

from collections.abc import Callable

from refusal import claim_tests_cones, claim_tests_doses, claim_tests_labels, claim_tests_signs, claim_tests_windows
from refusal.claim_evidence import Finding

MODULES = (claim_tests_labels, claim_tests_signs, claim_tests_doses, claim_tests_cones, claim_tests_windows)
TESTS: dict[str, Callable[..., Finding]] = {test.__name__: test for module in MODULES for test in module.TESTS}
