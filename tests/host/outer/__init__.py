"""The part of the test host that runs on the developer's machine: build, boot, report."""
