"""Three speeds of tests: ``fast`` ones, all but ``slow`` ones (the default of --test), and all."""

import pytest

FIRST_FAMILY = "llama"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as fast what is neither long, slow nor end to end; of the families, the first one."""
    for item in items:
        marked = any(item.get_closest_marker(name) for name in ("slow", "e2e", "long"))
        parameters = getattr(item, "callspec", None)
        named = parameters.params if parameters else {}
        family = named.get("family", named.get("layout", FIRST_FAMILY))
        if not marked and family == FIRST_FAMILY:
            item.add_marker("fast")
